"""Knowledge bricks: what a frozen backbone is told beside what it knows."""
