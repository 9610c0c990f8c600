"""How a student leaves: ONNX, torch.export and the Hub folder, each checked against the original."""
