"""The model as operations over values: what both framework readers speak, and what targets place quantizers on."""
