"""Messages between the gateways and the instances, and the channels that carry them."""
