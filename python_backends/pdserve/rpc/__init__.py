"""What the gateways and the instances say to each other, and how it travels."""
