"""How good a network is: accuracy, calibration, fidelity to its teacher, cost."""
