"""The abilities of a host: found out (`probe`), recorded (`inventory`), judged (`advice`)."""
