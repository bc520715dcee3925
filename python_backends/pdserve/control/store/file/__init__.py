"""A store for the processes of one host, in a SQLite database: nothing to install or to start."""
