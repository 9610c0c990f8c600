"""Recipes x seeds: which runs there are, and each as a process of its own, here or on an engine that exists."""
