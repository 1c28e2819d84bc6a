"""The faults that mutants.py plants: code of a file, what replaces it, and the harm it would do."""

from mutants import Mutant

# Schedules and walks, without the images that are made as upstream made them.
_SAMPLING = " ".join(
    f"test_sampling.py::test_{name}"
    for name in (
        "pndm_of_today_is_diffusers_pndm",
        "pndm_follows_timestep_spacing",
        "first_profile_is_the_recorded_one",
        "first_profile_updates_like_an_offset_of_one_and_ends_with_nothing",
        "ddim_is_diffusers_ddim",
        "dpm_solver_is_diffusers_dpm_solver",
        "spacing_defaults_to_that_of_diffusers",
        "guidance_moves_from_without_to_with_text",
        "what_is_not_supported_is_refused",
        "settings_left_out_are_those_of_diffusers",
        "the_range_of_steps_is_the_training_steps",
        "a_walk_is_guide_and_step",
    )
)

# file -> the tests that cover it, and (code, what replaces it, the harm)
_BY_FILE = {
    "engine/loop/calls.py": (
        "test_driver.py",
        (
            "replace(text, guidance=guidance or usual)",
            "replace(text, guidance=usual)",
            "guidance that is embedded is always the model's own",
        ),
        (
            "ImageNoise([request.seed for request in requests]",
            "ImageNoise([0 for request in requests]",
            "the seed decides nothing",
        ),
    ),
    "engine/loop/driver.py": (
        "test_driver.py test_tasks.py",
        ("[places[-1]] * (slots", "[0] * (slots", "an image shows words that its neighbour's prompt names"),
        (
            "if call in captured_calls:",
            "if call + 1 in captured_calls or call == 0:",
            "labels are read a call too early",
        ),
        (
            "task: reduce(and_, map(is_finite, each.values()))",
            "task: reduce(lambda a, b: a | b, map(is_finite, each.values()))",
            "an image with a NaN label is kept",
        ),
        (
            'checks["features"] = reduce(and_, map(is_finite, values))',
            'checks["features"] = is_finite(values[-1])',
            "an image with a NaN feature is kept",
        ),
        (".flatten(1).all(1)", ".flatten(1).any(1)", "an image with one NaN pixel is kept"),
        (
            "merge_retry(first, retry) if isinstance(first, Quarantined) else first",
            "retry",
            "sound images are replaced too",
        ),
        (
            "SamplerState(recipe.schedule, recipe.guidance",
            "SamplerState(recipe.schedule, 1.0",
            "guidance is not applied",
        ),
    ),
    "engine/engines/fast/engine.py": (
        "test_models.py",
        ("or self._text[2] != size", "", "where memory is short, images are drawn for the texts of others"),
    ),
    "engine/loading/in_memory.py": (
        "test_pipeline.py",
        (
            'read[SCHEDULER]["_class_name"] = type(present[SCHEDULER]).__name__',
            "pass",
            "a scheduler that code has built is taken for PNDM",
        ),
    ),
    "disk/storage.py": (
        "test_ledger.py",
        ("sync(part)", "pass", "after a power cut a finished ledger is empty"),
    ),
    "runs/compositions/merging.py": (
        "test_merge.py",
        ("labels=labels, trust=row.trust", "labels=labels", "merged samples are trusted that were not"),
    ),
    "service/batching.py": (
        "test_serve.py",
        (
            "each.group == first.group and not each.is_alone",
            "each.group == first.group",
            "the bytes of a deterministic request depend on who asks beside it",
        ),
    ),
    "disk/sqlite.py": (
        "test_ledger.py",
        ('self.execute("ROLLBACK")', 'self.execute("COMMIT")', "half of a batch is committed"),
    ),
    "engine/loop/labelling.py": (
        "test_driver.py test_tasks.py",
        ("len(label.classes) - 1", "len(label.classes) - 2", "the last word of a prompt is never found"),
        ("if not flags[b]]", "if not flags[0]]", "one broken image quarantines its whole batch"),
        (
            "torch.stack(list(checks.values()))[:, :count]",
            "torch.stack(list(checks.values()))[:, -count:]",
            "a padded batch quarantines another image",
        ),
        (
            "captions.held_to(raw, config, prompts, named=named, tokenizer=tokenizer)",
            "raw",
            "classes a prompt does not name are found",
        ),
    ),
    "runs/run_folder/ledger.py": (
        "test_ledger.py",
        ("INSERT OR REPLACE INTO samples", "INSERT OR IGNORE INTO samples", "a sample set aside can never be made"),
        (
            """'"index" >= ? AND "index" < ?'""",
            """'"index" >= ? AND "index" <= ?'""",
            "the first sample of the next batch is never made",
        ),
        ("sort_keys=True", "sort_keys=False", "equal runs differ in bytes"),
        ("allow_nan=False", "allow_nan=True", "files that no JSON reader takes"),
        (
            "documents.check_inside(*names or [usual_path(role, id)])",
            "(names or [usual_path(role, id)])[0]",
            "a foreign ledger names files outside its folder",
        ),
        ('if line != "ok"', 'if line == "ok"', "damage is not found"),
    ),
    "runs/run_folder/indexes/coco.py": (
        "test_ledger.py",
        ("number = 0", "number = -1", "pycocotools ignores the first annotation"),
        ('"image_id": row.request.index', '"image_id": number', "annotations of another image"),
        ("is_first = False", "pass", "files that no JSON reader takes"),
    ),
    "runs/run_folder/indexes/__init__.py": (
        "test_ledger.py",
        ("len(record) if isinstance(record, list) else record", "record", "every mask stands there twice"),
    ),
    "runs/run_folder/indexes/card.py": (
        "test_ledger.py",
        ("ledger.count()", "document['plan']['number']", "the card claims samples that are not there"),
        ('.replace("`", "\'")', "", "a model's name breaks out of its quotes"),
    ),
    "engine/sampling/schedule.py": (
        f"{_SAMPLING} test_guided_step.py test_sampling.py::test_noise_of_large_seeds_is_that_of_torch",
        ("without + self.guidance *", "with_text + self.guidance *", "stronger guidance than asked for"),
        ("(newest - 1) % slots", "(newest + 1) % slots", "earlier outputs in the wrong order"),
        (
            "if update.is_kept:",
            "if True:",
            "PLMS drifts",
        ),
        ("self.origin if self.schedule", "self.latents if self.schedule", "the warm-up of PLMS starts twice"),
        ("steps <= most", "steps < most", "the largest number of steps is refused"),
        ("times.max() >= count", "times.max() > count", "a timestep the model was never trained at"),
        ("times.round()", "np.floor(times)", "timesteps off by one"),
        ("manual_seed(seed) for", "manual_seed(min(seed, 2**31 - 1)) for", "all large seeds give one image"),
    ),
    "engine/sampling/multistep.py": (
        _SAMPLING,
        ("min(k, 4) - 1", "min(k, 3) - 1", "a lower order than PLMS has"),
        ("37 / 24", "-37 / 24", "a wrong coefficient of Adams and Bashforth"),
        ("if time >= 0 else final", "if time > 0 else final", "the last step goes elsewhere"),
    ),
    "engine/sampling/ddim.py": (
        _SAMPLING,
        ("if time >= stride", "if time > stride", "the last step goes elsewhere"),
        ('"set_alpha_to_one", True', '"set_alpha_to_one", False', "another default than that of diffusers"),
    ),
    "engine/sampling/dpm_solver.py": (
        _SAMPLING,
        ("0.5 * h /", "h /", "the second order is counted twice"),
        ("Update(0.0, (1.0,), entries[-1])", "Update(0.0, (1.0,))", "the last step does not end at a clean image"),
    ),
    "engine/sampling/euler.py": (
        "test_flow_sampling.py",
        ("change / before", "change", "a network that predicts v is read as one that predicts noise"),
        (
            "return first / math.hypot(first, 1)",
            "return 1.0",
            "the first latents have another size than those of diffusers",
        ),
        ("((target - 1) * sigma,), noise=target", "((target - 1) * sigma,)", "no fresh noise"),
        ("(half, -half)", "(half, half)", "a step is made twice"),
    ),
    "engine/sampling/flow.py": (
        "test_flow_sampling.py",
        ("low - slope * least", "low", "another shift for the size of the image"),
        ("[*sigmas.tolist(), 0.0]", "[*sigmas.tolist(), 0.001]", "some noise is left"),
    ),
    "engine/sampling/unipc.py": (
        "test_flow_sampling.py",
        ("if k > 0", "if k > 1", "the first step is not corrected"),
    ),
    "engine/models/capture.py": (
        "test_models.py",
        (
            "probabilities(q.chunk(self.rows)[-1], k.chunk(self.rows)[-1])",
            "probabilities(q.chunk(self.rows)[0], k.chunk(self.rows)[0])",
            "empty prompt's maps",
        ),
        ("self.sums[level].add_(projected.flatten(0, 1), alpha=1 / blocks)", "pass", "no attention maps on a GPU"),
        ("self.sums[level].addmm_(maps,", "torch.addmm(self.sums[level], maps,", "nor on a CPU"),
        (
            "[: -self.batch] for part in (q, k, v))), output",
            "[-self.batch :] for part in (q, k, v))), output",
            "equal halves",
        ),
        (
            "[-len(matrices) :], matrices)",
            "[: len(matrices)], matrices)",
            "a level of one half reads the empty prompt's",
        ),
        (
            "zip(decoders, stops, stops[1:])",
            "zip(decoders, [0] * len(stops), stops[1:])",
            "decoders read each other's sums",
        ),
    ),
    "engine/models/blocks.py": (
        "test_blocks.py",
        ("step.joins, step.keeps, block is parting", "False, step.keeps, block is parting", "skips are left out"),
        ("hook.feature(self.entry, double_halves(entry))", "pass", "a level lacks its first feature"),
        ("if x is not None:", "if False:", "levels lack their features"),
        ("hook.on_queries(inner.slot, q, k)", "pass", "levels lack their maps"),
    ),
    "engine/decoders/segmentation.py": (
        "test_decoders.py",
        ("content.contiguous(), position.contiguous()", "content.contiguous(), content.contiguous()", "positions lost"),
        ("memory[: len(self.stacked.memory)]", "memory", "decoders of few layers do not run"),
    ),
    "engine/tasks/instance.py": (
        "test_tasks.py",
        ("iou > threshold", "iou >= threshold", "neighbours that touch the limit are dropped"),
        (
            "scores.sort(dim=1, descending=True, stable=True)",
            "scores.sort(dim=1, descending=True)",
            "files that differ by device",
        ),
        (">= max(1, scaled_area", "> max(1, scaled_area", "things of one pixel vanish"),
        (
            "max(1, scaled_area(config.min_area, size))",
            "scaled_area(config.min_area, size)",
            "instances without a pixel",
        ),
        ("scores >= config.score_threshold", "scores > config.score_threshold", "a thing at the threshold is dropped"),
        ("areas[:, None] - common", "areas[:, None]", "doubles are kept"),
    ),
    "engine/tasks/pose.py": (
        "test_tasks.py test_training.py::test_of_several_people_the_largest_is_learnt",
        ("int(np.argmax(present(item.keypoint_areas)))", "0", "the first person of a picture is learnt"),
        (
            "score >= config.score_threshold / 2",
            "score >= config.score_threshold / 4",
            "joints that are not there are shown",
        ),
        ("step.clamp(-0.5, 0.5)", "step", "joints fly out of their cell"),
        ("(places > 0) & (places < sides - 1)", "(places > 0) & (places < sides)", "joints at the border are moved"),
        ("(places + 0.5) *", "places *", "joints half a cell off"),
        ("torch.minimum(sure_x, sure_y)", "torch.maximum(sure_x, sure_y)", "joints surer than they are"),
        ("(score * is_sure).sum(1)", "score.sum(1)", "hidden joints raise a person's score"),
    ),
    "engine/tasks/semantic.py": (
        "test_tasks.py",
        (".sum((2, 3)) < min_area", ".sum((2, 3)) <= min_area", "classes of exactly the least area vanish"),
        ("is_small[:, 0] = False", "pass", "the background vanishes"),
    ),
    "engine/tasks/open_vocabulary.py": (
        "test_tasks.py",
        ("winner + 1", "winner", "words are numbered one too low"),
        ("(probability * is_there)", "probability", "words below the threshold are found"),
    ),
    "engine/tasks/captions.py": (
        "test_tasks.py",
        ("logits + (total - remaining), logits)", "logits, logits)", "what is ruled out takes its probability away"),
    ),
    "engine/labels/semantic.py": (
        "test_label_files.py",
        ("* 255 + 0.5)", "* 255)", "confidences are rounded down"),
        (
            "np.minimum(np.fmax(label.confidence, 0), 1)",
            "np.fmax(label.confidence, 0)",
            "a high confidence becomes low",
        ),
        ("number not in known and", "number > 254 and", "a class that does not exist passes the audit"),
    ),
    "engine/labels/instance.py": (
        "test_label_files.py test_export_values.py",
        ('"category_id": numbers[kind]', '"category_id": numbers[kind] - 1', "categories are numbered one too low"),
        ("round_float(score, 6)", "round_float(score, 3)", "scores that are equal in files only"),
        ('0 <= item["score"] <= 1', '0 <= item["score"]', "an impossible score passes the audit"),
        (
            "round_float(side) for side in box",
            "round_float(side + 1) for side in box",
            "boxes of COCO miss their masks",
        ),
    ),
    "engine/labels/pose.py": (
        "test_label_files.py test_export_values.py",
        ("int((visibility > 0).sum())", "int((visibility > 1).sum())", "hidden joints are not counted"),
        (") if v else (0, 0, 0)", ")", "joints that are not there have a place"),
    ),
    "engine/labels/depth.py": (
        "test_label_files.py",
        ("np.rint(pixels, out=pixels)", "pixels", "depths are rounded down"),
    ),
    "runs/agreement/verify.py": (
        "test_verify.py",
        ("self.limit[0] and self.p99", "self.limit[0] or self.p99", "one bad sample of a hundred passes"),
        ("max(gate, MARGIN * drift)", "MARGIN * drift", "a gate stricter than the reference's own drift"),
        ("values.max(0).argmax()", "values.max(0).argmin()", "the page shows the best samples"),
        ('EXACT if dtype == "fp32" else ROUNDED', "ROUNDED", "an fp32 engine is judged as fp16"),
        (
            "in_blocks(requests, batch_size)",
            "in_blocks(requests[:-1], batch_size)",
            "the last sample is not compared",
        ),
        ("if not is_whole:", "if True:", "what only other commands need is never compared"),
    ),
    "runs/agreement/observe.py": (
        "test_verify.py",
        ('nan_to_num(nan=float("inf"))', "nan_to_num(nan=0.0)", "an engine that gives NaN agrees"),
    ),
    "untrusted/documents.py": (
        "test_untrusted.py",
        ('or ".." in parts', "", "files outside the folder are read"),
        ("if member.filename in names:", "if False:", "two readers see two archives"),
        (
            "stat.S_ISLNK(member.external_attr >> 16)",
            "stat.S_ISLNK(member.external_attr)",
            "a link leads out of an archive",
        ),
        ("len(value) < len(pairs)", "len(value) > len(pairs)", "two readers see two settings"),
        (
            'if depth > DEEPEST:\n        raise Refused(f"{name}',
            'if depth >= DEEPEST:\n        raise Refused(f"{name}',
            "a file of exactly the depth is refused",
        ),
    ),
    "untrusted/images.py": (
        "test_untrusted.py",
        ("width * height > most_pixels", "width * height >= most_pixels", "a picture of exactly the size is refused"),
        ('getattr(image, "n_frames", 1) > 1', 'getattr(image, "n_frames", 1) > 2', "an animation is read as an image"),
    ),
    "untrusted/tensors.py": (
        "test_checkpoints.py",
        ("sorted(state.keys() - expected.keys())", "[]", "tensors that nothing expects are left out without a word"),
        ("state[name].shape != expected[name].shape", "False", "tensors of another shape are not named"),
    ),
    "untrusted/onnx_graph.py": (
        "test_untrusted.py",
        ("facts.st_nlink > 1", "facts.st_nlink > 2", "a file linked from elsewhere is read"),
        ("offset + length > facts.st_size", "length > facts.st_size", "a graph reads beyond its data"),
        (
            "if message.op_type in NATIVE",
            "if (message.domain, message.op_type) in NATIVE",
            "a graph loads compiled code",
        ),
    ),
    "runs/workers/claims.py": (
        "test_work_claims.py",
        ('"deaths") + 1 if', '"deaths") if', "what kills every process is made for ever"),
        ("if content != claim:", "if content == claim:", "the batch of a process at work is taken from it"),
        ("<= LEASE_SECONDS", ">= LEASE_SECONDS", "a claim is over as soon as it is seen"),
        ("machine == host()", "machine", "a process of another machine is looked for here"),
    ),
    "engine/loop/prompts.py": (
        "test_driver.py::test_large_seeds_are_those_of_the_images_and_of_their_rows",
        ("self.seed + index", "min(self.seed + index, 2**31 - 1)", "all large seeds give one image"),
    ),
    "training/evaluation/ranking.py": (
        "test_metrics.py",
        ("int(np.argmax(truth.keypoint_areas))", "0", "joints are compared with those of the first person"),
    ),
    "runs/exporting/coco.py": (
        "test_export_values.py",
        ('"bbox": list(thing.box)', '"bbox": [thing.box[0] + 1, *thing.box[1:]]', "boxes of COCO miss their masks"),
        ("(person.joints[:, 2] > 0)", "(person.joints[:, 2] > 1)", "hidden joints are not counted"),
        ("key=lambda thing: -thing.score", "key=lambda thing: thing.score", "what is behind is in front"),
        ("sorted(sample.things, key=lambda thing: -thing.score)", "sample.things", "what is behind is in front"),
        ("right - x, bottom - y", "right - x - 1, bottom - y", "boxes of segments are too narrow"),
        ("[a + 1, b + 1]", "[a, b]", "limbs join other joints"),
    ),
    "runs/exporting/voc.py": (
        "test_export_values.py",
        ('"xmax": x + width', '"xmax": x + width + 1', "boxes of VOC end a pixel too far"),
        ('"ymax": y + height', '"ymax": y + height + 1', "boxes of VOC end a pixel too far"),
    ),
    "runs/exporting/format.py": (
        "test_export_values.py",
        (
            'np.argsort([thing.score for thing in self.things], kind="stable").tolist()',
            "range(len(self.things))",
            "what is behind is in front",
        ),
    ),
    "runs/exporting/cityscapes.py": (
        "test_export_values.py",
        ("counts[label_id] += 1", "counts[label_id] += 2", "numbers of instances leave some out"),
    ),
    "runs/exporting/yolo.py": (
        "test_export_values.py",
        ("(x + TO_EDGE) / sample.width", "x / sample.width", "joints half a pixel off"),
    ),
}

MUTANTS = tuple(
    Mutant(f"datasetdm_fast/{file}", old, new, harm, tests)
    for file, (tests, *faults) in _BY_FILE.items()
    for old, new, harm in faults
)
