"""What looks at a patched model, what finds how to patch one, and patches through a host's model patcher."""
