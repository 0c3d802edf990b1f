"""The site's own commands of Django's command line."""
