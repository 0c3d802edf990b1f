"""The site: chat with tuned models, watch runs, browse pairs. It talks to a model server over HTTP."""
