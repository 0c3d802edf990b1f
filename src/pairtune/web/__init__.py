"""The site: chat with what was tuned, watch runs, look at pairs. It talks to a server of models over HTTP."""
