"""Django settings. Deployment values come from environment variables, which `pairtune serve` sets."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import dj_database_url

HERE = Path(__file__).parent

# The runs folder, the model server, and the site's own data.
PAIRTUNE_RUNS = Path(os.environ.get("PAIRTUNE_RUNS", "runs")).absolute()
PAIRTUNE_BACKEND = os.environ.get("PAIRTUNE_BACKEND", "http://127.0.0.1:8001")
PAIRTUNE_SITE = Path(os.environ.get("PAIRTUNE_SITE", Path.home() / ".local" / "share" / "pairtune")).absolute()

# How the arena chooses who meets: where a vote tells most, or by lot (uniform).
PAIRTUNE_MATCHES = os.environ.get("PAIRTUNE_MATCHES", "informative")

# The API key, for backends that require one; never stored.
PAIRTUNE_KEY = os.environ.get("PAIRTUNE_BACKEND_KEY", "")

# Whether other machines can reach the site, so that people need a key (see `access.py`), and whether over TLS alone.
_HOSTS = [name for name in os.environ.get("PAIRTUNE_HOSTS", "").split(",") if name]
PAIRTUNE_SHARED = bool(_HOSTS)  # a proxy on this machine lets others in as well
PAIRTUNE_TLS = os.environ.get("PAIRTUNE_TLS") == "1"
# Of one address within a minute: messages, votes and other changes, on a site that other machines can reach.
PAIRTUNE_POSTS = int(os.environ.get("PAIRTUNE_POSTS", "90"))

# A new one at every start: people enter again after a restart, and nothing needs to be kept secret on the disk.
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or secrets.token_urlsafe(48)
DEBUG = False
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]", *_HOSTS]

INSTALLED_APPS = ["pairtune.web", "django.contrib.staticfiles", "django_htmx", "csp"]  # ours first, for its runserver
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "pairtune.web.access.Guard",
    "pairtune.web.faults.NoRoom",
]
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'", "data:"],
        "connect-src": ["'self'"],
        "form-action": ["'self'"],
        "base-uri": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
}
X_FRAME_OPTIONS = "DENY"
SECURE_REFERRER_POLICY = "same-origin"
CSRF_COOKIE_SAMESITE = SESSION_COOKIE_SAMESITE = "Strict"
SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_AGE = 30 * 24 * 3600
CSRF_COOKIE_SECURE = SESSION_COOKIE_SECURE = SECURE_SSL_REDIRECT = PAIRTUNE_TLS
PAIRTUNE_HSTS_SECONDS = 24 * 3600
SECURE_HSTS_SECONDS = PAIRTUNE_HSTS_SECONDS if PAIRTUNE_TLS else 0
# Only for this name and not for good: it may be a machine whose other services, or next owner, have no TLS.
SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]

ROOT_URLCONF = "pairtune.web.urls"
ASGI_APPLICATION = "pairtune.web.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {"context_processors": ["django.template.context_processors.request"]},
    }
]

DATABASES = {"default": dj_database_url.config(default=f"sqlite:///{PAIRTUNE_SITE / 'site.sqlite3'}")}
if DATABASES["default"]["ENGINE"].endswith("sqlite3"):
    # Readers do not wait for the writer, and writers wait for each other instead of failing. Every commit is synced, so
    # that a vote survives a power cut once a person has been told that it counts. Pages of the file are left to the
    # system's cache: SQLite's own would take up to 2 MB for every thread.
    DATABASES["default"]["OPTIONS"] = {
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA cache_size=-256;",
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
    }
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Finished answers as they are shown, so that long conversations open quickly; few enough that memory stays flat.
_MEMORY = "django.core.cache.backends.locmem.LocMemCache"
CACHES = {
    "default": {"BACKEND": _MEMORY, "OPTIONS": {"MAX_ENTRIES": 500}},
    # How often an address has done something: apart, so that answers do not push it out.
    "counts": {"BACKEND": _MEMORY, "LOCATION": "counts", "OPTIONS": {"MAX_ENTRIES": 10_000}},
}

STATIC_URL = "static/"
STATICFILES_DIRS = [HERE.parent / "report" / "static"]  # the charts' style sheet, which reports share
WHITENOISE_USE_FINDERS = True  # no collectstatic: files are served from the packages
WHITENOISE_AUTOREFRESH = False
LANGUAGE_CODE = "en-gb"
USE_I18N = False  # one language
USE_TZ, TIME_ZONE = False, None  # the machine's local time
DATA_UPLOAD_MAX_MEMORY_SIZE = 12_000_000  # so that a prompt of 1 MB gets the form's error, not a 400 page
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
