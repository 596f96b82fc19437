"""What looks at a patched model: what it does, what merged, and pictures of it."""
