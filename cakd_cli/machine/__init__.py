"""The computer: device, precision, memory, timing, compiling; knows torch alone."""
