"""What the tests of operations share: images in three colours."""

from tests.coloured_items import items

__all__ = ["items"]
