"""`python -m tomesd bench`, `plot`, `quality`: how fast each way to merge is, could be, and what it costs."""
