"""What models look like, and how to hang something on them: no method of merging is known here."""
