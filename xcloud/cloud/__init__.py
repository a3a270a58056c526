"""Adapters to clusters: sessions, placement groups, later autoscaling and prices."""
