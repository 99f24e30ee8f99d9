"""PEFT adapter folders merged as files: no backbone, no library, no network."""
