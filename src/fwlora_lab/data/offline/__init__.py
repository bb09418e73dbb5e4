"""The built-in synthetic task: acceptable and unacceptable English sentences from a small grammar."""
