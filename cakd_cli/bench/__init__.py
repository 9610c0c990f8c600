"""How fast it runs here: the engine's own steps, and the plain loop that it is measured against."""
