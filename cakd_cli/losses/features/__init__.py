"""What a student learns from the inside of its teacher: layers by name, connectors and memory banks of a term's own."""
