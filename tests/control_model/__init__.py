"""A queue model of groups, with the decisions of the control plane in the loop."""
