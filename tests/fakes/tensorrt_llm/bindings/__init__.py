"""The package of C++ bindings in the library."""
