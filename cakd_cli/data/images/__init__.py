"""Images: embedded, in memory and in folders, and how they are augmented."""
