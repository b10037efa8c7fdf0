"""The smaller model on its way to its users: checkpoint, card, Hub."""
