from .access import make_token
from .app import create_app, has_page
from .running import default_data_folder, run_server, serve
from .settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "default_data_folder", "has_page", "make_token", "run_server", "serve"]
