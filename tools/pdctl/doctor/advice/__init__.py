"""What an inventory means for a deployment; nothing here looks at the host."""
