"""The first loss: what trains the student."""
