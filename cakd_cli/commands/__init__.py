"""One thin file a command: words -> recipe -> engine -> output."""
