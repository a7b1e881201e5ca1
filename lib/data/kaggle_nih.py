"""NIH's X-rays on Kaggle, through the ``kaggle`` package: its credentials, its client, its
addresses.

What Kaggle's API allows decides the way. A data set comes as one zip, which it hands out by
redirecting to a signed address of its storage. It can also be asked for single files, but lists
only some of this set's and answers 404 for others, and 112,120 requests would meet its rate limit.
So the zip it is; since the storage sends any part of it, `lib.data.sources` reads its directory
first and then its members one by one, and the archive itself never lies on the disk."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import requests

from lib.data import http as transfer
from lib.data.http import DownloadError, Remote

NO_CREDENTIALS = (
    "Kaggle needs credentials, and {found}: (1) sign in at https://www.kaggle.com, an account is free; (2) make a token at "
    "https://www.kaggle.com/settings/api, 'Generate New Token'; (3) put it into the environment variable KAGGLE_API_TOKEN or into the file "
    "~/.kaggle/access_token (KAGGLE_USERNAME with KAGGLE_KEY, or kaggle.json, do as well), and give the same command again. "
    "Two sources need no credentials: --data chestmnist (the same X-rays at 64x64) and --data phantom (drawn ones)"
)


@dataclass(frozen=True)
class KaggleSet:
    """A data set on Kaggle and what is known of it."""

    owner: str
    name: str
    images: int

    @property
    def label(self) -> str:
        """As Kaggle writes it."""
        return f"{self.owner}/{self.name}"


SETS = {
    "kaggle": KaggleSet("nih-chest-xrays", "data", 112_120),
    "kaggle-sample": KaggleSet("nih-chest-xrays", "sample", 5_606),
}


def remote(kaggle_set: KaggleSet) -> Remote:
    """The zip of a data set. Nothing is imported, read or asked before the first use of what is
    returned.
    """
    page = f"https://www.kaggle.com/datasets/{kaggle_set.label}"
    hints = {
        401: "make a new token at https://www.kaggle.com/settings/api, and see that KAGGLE_USERNAME and KAGGLE_KEY belong together",
        403: f"open {page} while signed in, accept what it asks for, and try again",
        404: f"see whether {page} is still there",
    }
    api: list[Any] = []

    def resolve() -> requests.PreparedRequest:
        failure = ""
        try:
            with _hushed():
                if not api:
                    api.append(_authenticated())
                return _ask(api[0], kaggle_set)
        except (requests.RequestException, DownloadError):
            raise
        except Exception as error:
            # Its text may hold what the client was given; the kind of error must do.
            failure = f"Kaggle's client failed ({type(error).__name__}); see whether `kaggle datasets files {kaggle_set.label}` works"
        raise DownloadError(
            failure
        )  # out here, so that nothing that holds a credential hangs on it

    return Remote(resolve, f"{kaggle_set.label} from Kaggle", hints)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Nothing of the client reaches a screen: it prints help, and with ``VERBOSE`` set every
    header, the credential among them.
    """
    names = ("VERBOSE", "VERBOSE_OUTPUT")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.environ.update(kept)


def _authenticated() -> Any:
    """A `KaggleApi` with credentials, found in any way that it knows; DownloadError with the steps
    to get some if there are none.

    The package is imported here and not above: on import it makes its folder, looks for
    credentials, and checks a token over the network. Without credentials it calls ``exit``, which
    raises SystemExit, and NameError in a Jupyter kernel, where there is no ``exit``."""
    failure = ""
    try:
        from kaggle.api.kaggle_api_extended import KaggleApi
        from kagglesdk.kaggle_env import get_access_token_from_env

        api = KaggleApi()
        api.args = [argument for argument in api.args if argument != "--verbose"]
        try:
            api.authenticate()
            return api
        except (SystemExit, NameError):
            source = get_access_token_from_env()[1]
            found = (
                f"it does not take the token in {source}: it is mistyped, expired or revoked"
                if source
                else "none were found"
            )
            failure = NO_CREDENTIALS.format(found=found)
    except ImportError as error:
        failure = f"the package kaggle cannot be imported ({error.name or 'a part of it'} is missing): pip install 'kaggle>=2.2,<3'"
    except requests.RequestException:
        raise
    except OSError as error:  # of its folder; those of the network were requests' own
        failure = f"Kaggle's client cannot use its folder ({error.strerror}); name another one with KAGGLE_CONFIG_DIR"
    raise DownloadError(failure)


def _ask(api: Any, kaggle_set: KaggleSet) -> requests.PreparedRequest:
    """The request that yields the zip: the last one of the chain of redirects that the client
    followed.
    """
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    question = ApiDownloadDatasetRequest()
    question.owner_slug, question.dataset_slug = kaggle_set.owner, kaggle_set.name
    with api.build_kaggle_client() as client:
        session = getattr(client.http_client(), "_session", None)
        if session is not None:  # the client would wait for ever
            session.send = functools.partial(session.send, timeout=transfer.TIMEOUT)
        response = client.datasets.dataset_api_client.download_dataset(question)
        response.close()  # nothing of its body is read: what comes next asks for parts
    return response.request
