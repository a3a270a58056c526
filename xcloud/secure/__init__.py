"""Security: identities, sealed envelopes, and the protocol by which only a sum is ever opened."""
