"""The admin for a WSGI server: `gunicorn config.wsgi`. It serves only the database of DATABASE_URL."""

import os

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

if settings.IS_DEVELOPMENT:
    raise ImproperlyConfigured(
        "DATABASE_URL is not set, and config.wsgi serves no other database. Set it in the environment of the web "
        "server or in .env. To serve the embedded development database, use `python manage.py runserver`."
    )

if settings.NOT_SERVED:
    raise ImproperlyConfigured(settings.NOT_SERVED)

application = get_wsgi_application()
