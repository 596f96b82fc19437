"""One technique a file: its options at the top, what it hangs on a model below."""
