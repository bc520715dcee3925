"""What a host can do: found out (`probe`), written down (`inventory`), judged (`advice`)."""
