"""File formats that both framework sides write, from one to the other."""
