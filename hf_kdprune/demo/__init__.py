"""The embedded default: real data, and the whole job run on it."""
