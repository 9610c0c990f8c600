"""What a run is: the schema, strict YAML, overrides, and the recipes that ship.

Nothing is imported here, so that listing recipes does not wait for torch.
"""
