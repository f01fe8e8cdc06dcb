"""HTTP below the routes: connections, headers, bodies, keys, errors."""
