"""The consequences of an inventory for a deployment; nothing here looks at the host."""
