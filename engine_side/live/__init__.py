"""Live modules: write parameters in place, walk module trees, find storage layouts and forward caches."""
