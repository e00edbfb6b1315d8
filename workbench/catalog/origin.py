"""What an artefact was made from, read from the record that lies beside it.

An SAE's record is its `provenance.json`, a result's the row `provenance` of its file. Both are JSON objects that only
grow from version to version; this is the one place that knows their keys.

    an SAE trained here      run, harvest (its description), hook, training (its configuration), versions; with stream
                             in place of harvest where the model ran beside training
    an imported SAE          imported (format and path, or release and id; rule; fingerprint), hook, versions
    a result                 model, corpus, saes (fingerprints by name), transcoders (name and fingerprint of a set),
                             ... as far as they had a part in it, versions;
                             or the record of the SAE it was measured on, and what it was measured with
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sae.errors import InputError
from sae.shown import Shown
from workbench.disk.names import lasting_name

if TYPE_CHECKING:
    from sae.model import SAE
    from sae.transcoder_set import TranscoderSet
    from workbench.models.load import LoadedModel
    from workbench.models.model import ModelInfo
    from workbench.text.corpora import Corpus

Record = Mapping[str, Any]


def _mapping(record: Record, key: str) -> Record:
    """The object at a key; empty where there is none."""
    found = record.get(key)
    return found if isinstance(found, Mapping) else {}


def _names(found: Any) -> list[str]:
    """The texts of a list, or the keys of an object; none of anything else."""
    return [name for name in found if isinstance(name, str)] if isinstance(found, Mapping | list | tuple) else []


def contexts_told(metadata: Record) -> tuple[int | None, bool]:
    """(tokens a context, whether it begins with BOS) as SAELens' metadata of an SAE says: None where it does not."""
    length = metadata.get("context_size")
    context_len = int(length) if isinstance(length, int | float) and length > 1 else None
    return context_len, metadata.get("prepend_bos") is not False


def lasting(record: Record) -> dict[str, Any]:
    """A record with its model and its corpus by the names that mean the same from everywhere, which older ones lack."""
    found = dict(record)
    for key, bundled in (("model", "demo"), ("corpus", "python-stdlib")):
        if named := _mapping(record, key):
            found[key] = {**named, "name": lasting_name(str(named.get("name", "")), bundled)}
    return found


def versions() -> dict[str, str]:
    """Versions that an artefact's numbers may depend on."""
    return {name: version(name) for name in ("interp-workbench", "torch", "transformers", "transformer-lens")}


@dataclass(frozen=True, repr=False)
class Origin(Shown):
    """What an artefact was made from; what is not known is None or empty."""

    record: Record
    """As it is stored; two artefacts have one origin when their records are equal."""
    model: str = ""
    """As `load_model` takes it."""
    weights_sha256: str | None = None
    """Of the model's checkpoint."""
    corpus: str | None = None
    """As `open_corpus` takes it, with `text_field`."""
    text_field: str = "text"
    fingerprint: str | None = None
    """Of the corpus' contents."""
    harvest: str | None = None
    hook: str = ""
    context_len: int | None = None
    separate: bool = False
    """Whether its contexts hold parts of one document each."""
    bos: bool = True
    """Whether contexts begin with BOS, where the model has one; `bos_recorded` says whether that is known."""
    run: str | None = None
    """The training run that made it."""
    training: Record = field(default_factory=dict)
    """The configuration it was trained with, as `sae.TrainConfig.to_dict` gives it."""
    imported: Record | None = None
    """Where it came from, for an SAE made elsewhere."""
    saes: tuple[str, ...] = ()
    """Names of the SAEs that a result was measured on."""
    transcoders: str | None = None
    """The set of transcoders that a result was measured on."""
    transcoders_fingerprint: str | None = None

    @classmethod
    def of_sae(cls, record: Record, metadata: Record | None = None) -> "Origin":
        """Reads the record of an SAE.

        Args:
            metadata: what its own configuration says of the model, the hook point and the contexts, for SAEs that were
                not trained here.
        """
        told = metadata or {}
        context_len, bos = contexts_told(told)
        harvest = _mapping(record, "harvest") or _mapping(record, "stream")
        config, corpus = _mapping(harvest, "config"), _mapping(harvest, "corpus")
        return cls(
            record,
            model=config.get("model", told.get("model_name") or ""),
            weights_sha256=_mapping(harvest, "model").get("weights_sha256"),
            corpus=config.get("corpus"),
            text_field=config.get("text_field", "text"),
            fingerprint=corpus.get("fingerprint"),
            harvest=harvest.get("name"),
            hook=record.get("hook", told.get("hook_name") or ""),
            context_len=config.get("context_len", context_len),
            separate=config.get("separate", False),
            bos=config.get("bos", bos),
            run=record.get("run"),
            training=_mapping(record, "training"),
            imported=_mapping(record, "imported") or None,
        )

    @classmethod
    def of_result(cls, record: Record, parameters: Record) -> "Origin":
        """Reads the record of a result, and from its parameters which SAEs it was measured on.

        Users store results of their own: what has another shape than ours is taken for not known.
        """
        saes = _names(record.get("saes")) or _names(parameters.get("saes"))
        saes += _names([record.get("sae"), parameters.get("sae")])
        # A pair of SAEs that were matched.
        saes += _names([parameters[key] for key in "ab" if key in parameters and key in record])
        saes = list(dict.fromkeys(saes))
        model = _mapping(record, "model")
        if not model:
            return replace(cls.of_sae(record), saes=tuple(saes))
        corpus, transcoders = _mapping(record, "corpus"), _mapping(record, "transcoders")
        return cls(
            record,
            model=model.get("name", ""),
            weights_sha256=model.get("weights_sha256"),
            corpus=corpus.get("name"),
            text_field=corpus.get("text_field", "text"),
            fingerprint=corpus.get("fingerprint"),
            saes=tuple(saes),
            transcoders=next(iter(_names([transcoders.get("name"), parameters.get("transcoders")])), None),
            transcoders_fingerprint=transcoders.get("fingerprint"),
        )

    @classmethod
    def of_measurement(
        cls,
        model: "LoadedModel",
        *,
        corpus: "Corpus | None" = None,
        saes: "Mapping[str, SAE] | None" = None,
        transcoders: "tuple[str, TranscoderSet] | None" = None,
        **more: Any,
    ) -> "Origin":
        """Of a result that is about to be measured on a model.

        Args:
            corpus: the text it is measured on.
            saes: the SAEs it is measured on, by name.
            transcoders: name and set of the transcoders it is measured on.
            more: what else had a part in it (must be JSON).
        """
        model.check_unchanged()
        record: dict[str, Any] = {"model": model.info.to_dict(), **more}
        if corpus is not None:
            record["corpus"] = {"name": corpus.name, "fingerprint": corpus.fingerprint}
            if corpus.text_field != "text":
                record["corpus"]["text_field"] = corpus.text_field
        if saes:
            record["saes"] = {name: sae.fingerprint() for name, sae in saes.items()}
        if transcoders is not None:
            name, coders = transcoders
            record["transcoders"] = {"name": name, "fingerprint": coders.fingerprint()}
        return cls.of_result({**record, "versions": versions()}, {})

    def measured_with(self, **more: Any) -> "Origin":
        """Of a result measured on the artefact of this origin: its record, `more` and the versions."""
        return Origin.of_result({**self.record, **more, "versions": versions()}, {})

    @property
    def model_info(self) -> "ModelInfo":
        """What was loaded, for a result measured on a model."""
        from workbench.models.model import ModelInfo

        return ModelInfo(**self.record["model"])

    @property
    def rule(self) -> Record:
        """The selection rule an SAE was trained with, name and settings; empty where it is not known."""
        return self.training.get("rule") or (self.imported or {}).get("rule", {})

    @property
    def tokens(self) -> int | None:
        """Tokens that an SAE was trained on: whole batches, as many as come nearest to those asked for."""
        from sae.config import steps_of

        total, batch = self.training.get("total_tokens"), self.training.get("batch_size")
        return total if total is None or batch is None else steps_of(total, batch) * batch

    @property
    def bos_recorded(self) -> bool:
        """Whether the record says how contexts begin: old ones leave it out of models of one's own that have no BOS."""
        from workbench.models.model import OWN

        harvest = _mapping(self.record, "harvest") or _mapping(self.record, "stream")
        return "bos" in _mapping(harvest, "config") or _mapping(harvest, "model").get("source") not in OWN

    @property
    def told(self) -> dict[str, Any]:
        """What SAELens' metadata says of training, where it was here; `contexts_told` reads it."""
        if self.context_len is None or self.corpus is None:
            return {}
        begins = {"prepend_bos": self.bos} if self.bos_recorded else {}
        return {"context_size": self.context_len, **begins, "dataset_path": self.corpus}

    def begins(self, model: "LoadedModel") -> bool:
        """Whether contexts of `model`, which this was made from, begin with BOS."""
        return self.bos and model.bos_id is not None

    @property
    def frozen_decoder(self) -> bool:
        """Whether an SAE is a baseline whose decoder stayed at its random initialisation."""
        return bool(self.training.get("frozen_decoder"))

    def load(self, what: str, model: "LoadedModel | None" = None, device: str = "auto") -> "LoadedModel":
        """The model that `what` was made from, with texts that begin with BOS if its contexts did.

        Args:
            model: it, where it is loaded already.

        Raises:
            InputError: a model that cannot be loaded, or another one.
        """
        from workbench.models.load import reload_model

        loaded = model or reload_model(self.model, device=device, sha256=self.weights_sha256)
        self.check_model(loaded, what)
        return loaded.beginning(self.bos)

    def check_model(self, model: "LoadedModel", what: str) -> None:
        """Raises InputError when `model` is another one than `what` was made from, where that is known.

        Also when its weights were changed after it was loaded.
        """
        model.check_unchanged()
        if self.weights_sha256 in (None, model.info.weights_sha256):
            return
        from workbench.models.model import OWN

        live, known = model.info.source == "live", model.info.source in OWN
        raise InputError(
            f"the model at {model.info.name} has other weights {'or another forward pass ' if known else ''}than the "
            f"one behind {what}: "
            + ("load that one and hold on to it, or give it, model=..." if live else "give the same checkpoint")
        )
