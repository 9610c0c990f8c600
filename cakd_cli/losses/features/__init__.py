"""What a student learns from the inside of its teacher: layers by name, and connectors that are trained along."""
