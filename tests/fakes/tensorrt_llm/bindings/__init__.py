"""In the library, what is bound from C++."""
