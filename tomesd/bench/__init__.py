"""`python -m tomesd bench` and `plot`: how fast each way to merge is, and how fast it could be."""
