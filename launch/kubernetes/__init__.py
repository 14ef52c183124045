"""The Kubernetes backend: writes a manifest and starts nothing.

There is no control plane to talk to: the text goes to `kubectl apply -f -`, and from then on
the cluster starts, watches and restarts the workers. Read `documents`, then `pod`.
"""
