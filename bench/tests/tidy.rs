//! House rules as a test: what ARCHITECTURE.md and CONTRIBUTING.md promise about every file.
//!
//! Data first: each rule is a table with the reason beside it, then the few functions that read it. The exceptions are
//! ratchets: an entry that is no longer needed fails, so lists only get shorter.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Texts that must not stand in some files.
struct Ban {
    texts: &'static [&'static str],
    applies: fn(&File) -> bool,
    why: &'static str,
}

// Split, so that this file keeps its own rules.
const BANS: &[Ban] = &[
    Ban {
        texts: &[concat!("env", "::var")],
        applies: |file| {
            file.is("rs") && !file.path.starts_with("kvd/src/config") && !file.path.ends_with("build.rs")
        },
        why: "only kvd/src/config reads the environment; put it in kvd.toml",
    },
    Ban {
        texts: &[
            concat!("Instant", "::now"),
            concat!("SystemTime", "::now"),
            concat!("rand", "::"),
            concat!("RandomState", "::"),
        ],
        applies: |file| file.is("rs") && DECIDING.iter().any(|deciding| file.path.starts_with(deciding)),
        why: "what decides has no clock and no randomness: take `now` and estimates as arguments (law 8)",
    },
    Ban {
        texts: &[
            concat!(".aw", "ait"),
            concat!("async ", "fn"),
            concat!("std::", "fs::"),
            concat!("std::", "net::"),
        ],
        applies: |file| file.is("rs") && DECIDING.iter().any(|deciding| file.path.starts_with(deciding)),
        why: "what decides waits for nothing and touches no file or socket: return an effect (law 8)",
    },
    Ban {
        texts: &[
            concat!("to", "do!"),
            concat!("unimple", "mented!"),
            concat!("TO", "DO"),
            concat!("FIX", "ME"),
        ],
        applies: |file| !file.is("json"),
        why: "finish it, or say in an issue what is missing",
    },
    Ban {
        texts: &[concat!("/wo", "rk/"), concat!("/tmp/", "wt"), concat!("/ho", "me/"), concat!("/ro", "ot/")],
        applies: |_| true,
        why: "no path of one machine",
    },
    Ban {
        texts: &[concat!("thread::", "sleep"), concat!("time::", "sleep")],
        applies: |file| file.is("rs") && file.path.contains("/tests/"),
        why: "a sleep is no synchronisation: wait for the event, with a deadline",
    },
    Ban {
        texts: &[concat!("time.", "sleep"), concat!("import ", "sleep")],
        applies: |file| is_python(file) && !PYTHON_POLLS.contains(&file.path.as_str()),
        why: "a sleep is no synchronisation: poll with a deadline, as tests/rig.py does",
    },
    Ban {
        texts: &[concat!("os.env", "iron"), concat!("os.get", "env")],
        applies: |file| is_python(file) && !file.path.contains("/tests/"),
        why: "settings are arguments, or the engine's own configuration: nothing hides in the environment",
    },
    Ban {
        texts: &[concat!("hash", "lib"), concat!("bla", "ke3")],
        applies: |file| {
            is_python(file) && !file.path.contains("/tests/") && !PYTHON_DIGESTS.contains(&file.path.as_str())
        },
        why: "ids and revisions are hashed in Rust, in one place (law 6)",
    },
];

/// Where the package's tests poll, with a deadline.
const PYTHON_POLLS: &[&str] = &["client/python/tests/rig.py"];

/// Digests that make a name or a tag out of settings; no id is among them.
const PYTHON_DIGESTS: &[&str] =
    &["client/python/kvd/sglang/config.py", "client/python/kvd/trtllm/settings.py"];

/// Code that decides. Measuring and doing are elsewhere.
const DECIDING: &[&str] = &[
    "proto/src/",
    "tiers/src/slots",
    "tiers/src/catalog/mod.rs",
    "tiers/src/eviction/",
    "tiers/src/segment.rs",
    "tiers/src/measure.rs",
    "tiers/src/gpu/paged",
    "tiers/src/gpu/transfer/check.rs",
    "tiers/src/gpu/transfer/cut.rs",
    "tiers/src/gpu/transfer/progress.rs",
    "tiers/src/gpu/transfer/queue.rs",
    "tiers/src/gpu/transfer/room.rs",
    "tiers/src/gpu/transfer/steps.rs",
    "kvd/src/node/",
    "kvd/src/index/",
    "kvd/src/cluster/roster.rs",
    "router/src/choose.rs",
    "router/src/fleet.rs",
    "router/src/observe.rs",
    "router/src/openai.rs",
    "router/src/tally.rs",
    "kvd/src/links.rs",
    "kvd/src/workers.rs",
    "router/src/place.rs",
    "planner/src/decide/",
    "planner/src/forecast.rs",
    "planner/src/observe.rs",
    "planner/src/plan.rs",
    "planner/src/predict.rs",
    "planner/src/size.rs",
    "tiers/src/s3/envelope.rs",
    "tiers/src/s3/footer.rs",
    "tiers/src/s3/index.rs",
    "tiers/src/s3/manifest.rs",
    "tiers/src/s3/name.rs",
    "tiers/src/s3/pack.rs",
];

/// What each crate may import of ours: downwards only, and no service another service.
const IMPORTS: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("tiers", &["kvd-proto"]),
    ("client", &["kvd-proto"]),
    ("client/python", &["kvd-proto", "kvd-client"]),
    ("kvd", &["kvd-proto", "kvd-tiers", "kvd-client"]),
    ("router", &["kvd-proto", "kvd-client"]),
    ("planner", &["kvd-proto", "kvd-client"]),
    ("bench", &["kvd-proto", "kvd-tiers", "kvd-client", "kvd", "kvd-router", "kvd-planner"]),
    ("bench/fuzz", &["kvd-proto", "kvd-tiers", "kvd-client", "kvd"]),
];

/// Dependencies that no source names, and why they are there.
const UNNAMED_DEPENDENCIES: &[(&str, &str, &str)] = &[
    ("proto", "tonic-prost", "called by the code that the build generates"),
    ("kvd", "hyper", "named by the tiers' S3 server and proxy, which kvd's tests compile in place"),
    ("kvd", "hyper-util", "as hyper"),
    ("kvd", "s3s", "as hyper"),
    ("kvd", "s3s-fs", "as hyper"),
    ("bench", "s3s", "named by the tiers' S3 server, which is compiled in place"),
    ("bench", "s3s-fs", "as s3s"),
    ("bench/fuzz", "serde", "named by kvd's and the router's files that its targets compile in place"),
];

const FILE_LINES_MAX: usize = 600;
/// Longer files, and how long they may be.
const LONG_FILES: &[(&str, usize)] = &[("kvd/src/node/tests/harness.rs", 720)];

/// Python says more in a line.
const PYTHON_FILE_LINES_MAX: usize = 400;

const FUNCTION_LINES_MAX: usize = 70;
/// Longer functions, and how long they may be.
const LONG_FUNCTIONS: &[(&str, &str, usize)] = &[("proto/src/layout.rs", "check", 79)];

/// One file of the tree.
struct File {
    path: String,
    text: String,
}

impl File {
    fn is(&self, extension: &str) -> bool {
        Path::new(&self.path).extension().is_some_and(|found| found == extension)
    }
}

fn is_python(file: &File) -> bool {
    file.is("py")
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("bench is in the root").to_owned()
}

/// Every text file that is ours.
fn files() -> Vec<File> {
    let root = root();
    let read = |path: String| Some(File { text: std::fs::read_to_string(root.join(&path)).ok()?, path });
    let found: Vec<File> = paths().into_iter().filter_map(read).collect();
    assert!(found.len() > 30, "only {} files found below {}", found.len(), root.display());
    found
}

/// What git knows or would add; in a copy without git, all but hidden folders and build outputs.
fn paths() -> Vec<String> {
    let mut git = std::process::Command::new("git");
    let listing =
        git.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(root()).output();
    match listing {
        Ok(listing) if listing.status.success() => {
            String::from_utf8_lossy(&listing.stdout).lines().map(str::to_owned).collect()
        }
        _ => walk(&root()),
    }
}

fn walk(root: &Path) -> Vec<String> {
    let (mut found, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for path in entries(&folder) {
            let name = path.file_name().expect("an entry has a name").to_string_lossy().into_owned();
            if path.is_symlink() || ["target", ".git", "shared"].contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(root).expect("below the root").to_string_lossy().into_owned());
            }
        }
    }
    found
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.expect("a folder entry").path()).collect()
}

fn none(broken: &[String]) {
    let list = broken.iter().fold(String::new(), |mut out, line| {
        write!(out, "\n  {line}").expect("a String grows");
        out
    });
    assert!(broken.is_empty(), "{} broken:{list}", broken.len());
}

#[test]
fn nothing_banned_stands_anywhere() {
    let mut broken = Vec::new();
    for file in files() {
        for ban in BANS.iter().filter(|ban| (ban.applies)(&file)) {
            for (number, line) in file.text.lines().enumerate() {
                for text in ban.texts.iter().filter(|text| has_word(line, text)) {
                    broken.push(format!("{}:{}: {text}: {}", file.path, number + 1, ban.why));
                }
            }
        }
    }
    none(&broken);
}

/// `text` in `line`, not as the end of a longer word ("operand::" is not "rand::").
fn has_word(line: &str, text: &str) -> bool {
    let starts_word = text.starts_with(|c: char| c.is_alphanumeric());
    line.match_indices(text).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !starts_word || !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
    })
}

#[test]
fn tests_inside_sources_do_not_sleep() {
    let mut broken = Vec::new();
    for file in files().iter().filter(|file| file.is("rs")) {
        let Some((_, tests)) = file.text.split_once("#[cfg(test)]\nmod tests {") else { continue };
        if tests.contains(concat!("thread::", "sleep")) || tests.contains(concat!("time::", "sleep")) {
            broken.push(format!("{}: a sleep is no synchronisation: wait for the event", file.path));
        }
    }
    none(&broken);
}

#[test]
fn every_file_opens_with_what_it_is() {
    let mut broken = Vec::new();
    for file in files() {
        let head: &[&str] = match Path::new(&file.path).extension().and_then(|extension| extension.to_str()) {
            Some("rs") => &["//!"],
            Some("proto") => &["//"],
            Some("py" | "pyi") => &["\"\"\""],
            // a crate's manifest opens with its name, and must describe itself
            Some("toml") if file.path.ends_with("/Cargo.toml") => {
                if !file.text.contains("\ndescription = ") {
                    broken.push(format!("{}: has no description", file.path));
                }
                continue;
            }
            Some("toml" | "sh" | "service" | "yaml" | "yml") => &["#"],
            None if file.text.starts_with("#!") => &["# "],
            _ => continue,
        };
        let first = file.text.lines().find(|line| !line.starts_with("#!")).unwrap_or_default();
        if !head.iter().any(|head| first.starts_with(head)) {
            broken.push(format!("{}: opens with {first:?}, not with a comment saying what it is", file.path));
        }
    }
    none(&broken);
}

/// The dependencies of one manifest: (section, name).
fn dependencies(manifest: &str) -> Vec<(String, String)> {
    let (mut section, mut found) = ("", Vec::new());
    for line in manifest.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
        } else if section.ends_with("dependencies") && !line.starts_with('#') {
            let name = line.split(['.', '=', ' ']).next().unwrap_or_default();
            if !name.is_empty() {
                found.push((section.to_owned(), name.to_owned()));
            }
        }
    }
    found
}

fn manifests(files: &[File]) -> impl Iterator<Item = (&str, &File)> {
    files.iter().filter_map(|file| Some((file.path.strip_suffix("/Cargo.toml")?, file)))
}

#[test]
fn every_dependency_is_used() {
    let files = files();
    let mut broken = Vec::new();
    let mut excused = 0;
    for (krate, manifest) in manifests(&files) {
        for (_, name) in dependencies(&manifest.text) {
            if UNNAMED_DEPENDENCIES.iter().any(|(c, n, _)| (*c, *n) == (krate, name.as_str())) {
                excused += 1;
                continue;
            }
            let path = format!("{}::", name.replace('-', "_"));
            let below = format!("{krate}/");
            let sources = files.iter().filter(|file| file.is("rs") && file.path.starts_with(&below));
            if !sources.into_iter().any(|file| has_word(&file.text, &path)) {
                broken.push(format!("{}: {name} is used by no source of the crate", manifest.path));
            }
        }
    }
    none(&broken);
    assert_eq!(excused, UNNAMED_DEPENDENCIES.len(), "an excuse in UNNAMED_DEPENDENCIES is no longer needed");
}

#[test]
fn imports_point_down() {
    let files = files();
    let mut broken = Vec::new();
    for (krate, manifest) in manifests(&files) {
        let allowed = IMPORTS.iter().find(|(name, _)| *name == krate);
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("{krate} is not in IMPORTS"));
        for (section, name) in dependencies(&manifest.text) {
            if name.starts_with("kvd") && !allowed.contains(&name.as_str()) {
                broken.push(format!("{}: {section} has {name}; allowed: {allowed:?}", manifest.path));
            }
        }
    }
    none(&broken);
}

#[test]
fn the_root_holds_what_architecture_names() {
    let architecture = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let mut broken = std::collections::BTreeSet::new();
    for path in paths() {
        let name = path.split_once('/').map_or(path.clone(), |(folder, _)| format!("{folder}/"));
        if !architecture.contains(&format!("`{name}`")) {
            broken.insert(format!("{name} is in the root and not in ARCHITECTURE.md"));
        }
    }
    none(&broken.into_iter().collect::<Vec<_>>());
}

#[test]
fn without_git_the_same_files_are_found() {
    let mut from_git = paths();
    from_git.retain(|path| root().join(path).exists());
    let walked = walk(&root());
    let missing: Vec<String> = from_git.into_iter().filter(|path| !walked.contains(path)).collect();
    none(&missing);
}

#[test]
fn files_stay_short() {
    let mut broken = Vec::new();
    let files = files();
    for file in files.iter().filter(|file| file.is("rs")) {
        let lines = file.text.lines().count();
        let listed = LONG_FILES.iter().find(|(path, _)| *path == file.path);
        match listed {
            Some((_, most)) if lines > *most => {
                broken.push(format!("{}: {lines} lines, was {most}: split it, by noun", file.path));
            }
            None if lines > FILE_LINES_MAX => {
                broken.push(format!("{}: {lines} lines: split it, by noun", file.path));
            }
            _ => {}
        }
    }
    for (path, _) in LONG_FILES {
        let now = files.iter().find(|file| file.path == *path).map_or(0, |file| file.text.lines().count());
        if now <= FILE_LINES_MAX {
            broken.push(format!("{path}: {now} lines now: take it off LONG_FILES"));
        }
    }
    none(&broken);
}

#[test]
fn python_files_stay_short_too() {
    let mut broken = Vec::new();
    for file in files().iter().filter(|file| is_python(file)) {
        let lines = file.text.lines().count();
        if lines > PYTHON_FILE_LINES_MAX {
            broken.push(format!(
                "{}: {lines} lines, at most {PYTHON_FILE_LINES_MAX}: split it, by noun",
                file.path
            ));
        }
        for (name, lines) in python_functions(&file.text) {
            if lines > FUNCTION_LINES_MAX {
                broken.push(format!("{}: {name} has {lines} lines, at most {FUNCTION_LINES_MAX}", file.path));
            }
        }
    }
    none(&broken);
}

/// (name, lines) of each function: it ends before the next line that is indented no more than its name.
fn python_functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let measured = lines.iter().enumerate().filter_map(|(at, line)| {
        let definition = line.trim_start();
        let definition = definition.strip_prefix("async ").unwrap_or(definition).strip_prefix("def ")?;
        let name = definition.split(['(', '[']).next().unwrap_or_default().to_owned();
        let ends = |next: &&str| {
            // the end of the arguments, on a line of its own, is still the function's
            !next.trim().is_empty() && indent(next) <= indent(line) && !next.trim_start().starts_with(')')
        };
        let body = lines[at + 1..].iter().take_while(|next| !ends(next));
        let length = 1 + body
            .collect::<Vec<_>>()
            .iter()
            .rposition(|line| !line.trim().is_empty())
            .map_or(0, |at| at + 1);
        Some((name, length))
    });
    measured.collect()
}

/// (name, lines) of each function with a body of its own lines: rustfmt puts its end at the indent of its beginning.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let measured = lines.iter().enumerate().filter_map(|(at, line)| {
        let name = function_name(line)?;
        let indent = &line[..line.len() - line.trim_start().len()];
        let opens = lines[at..].iter().position(|line| line.ends_with('{'))?;
        let ends = |line: &&str| line.starts_with(indent) && (line.ends_with(';') || line.ends_with('}'));
        if lines[at..=at + opens].iter().any(ends) {
            return None; // a declaration, or a body on the line of its name
        }
        let length = 1 + lines[at..].iter().position(|line| line.strip_prefix(indent) == Some("}"))?;
        Some((name.to_owned(), length))
    });
    measured.collect()
}

fn function_name(line: &str) -> Option<&str> {
    let mut rest = line.trim_start();
    if let Some(after) = rest.strip_prefix("pub") {
        rest = after
            .strip_prefix('(')
            .and_then(|inside| inside.split_once(')'))
            .map_or(after, |(_, after)| after);
        rest = rest.strip_prefix(' ')?;
    }
    for word in ["const ", "async ", "unsafe ", "extern \"C\" "] {
        rest = rest.strip_prefix(word).unwrap_or(rest);
    }
    rest.strip_prefix("fn ")?.split(['(', '<']).next()
}

#[test]
fn functions_fit_a_screen() {
    let mut broken = Vec::new();
    let mut needed = Vec::new();
    for file in files().iter().filter(|file| file.is("rs")) {
        for (name, lines) in functions(&file.text) {
            if lines <= FUNCTION_LINES_MAX {
                continue;
            }
            let listed =
                LONG_FUNCTIONS.iter().find(|(path, n, _)| (*path, *n) == (file.path.as_str(), name.as_str()));
            match listed {
                Some(entry) if lines <= entry.2 => needed.push(entry),
                _ => broken
                    .push(format!("{}: {name} has {lines} lines, at most {FUNCTION_LINES_MAX}", file.path)),
            }
        }
    }
    for entry in LONG_FUNCTIONS.iter().filter(|entry| !needed.contains(entry)) {
        broken.push(format!("{}: {} is short enough: take it off LONG_FUNCTIONS", entry.0, entry.1));
    }
    none(&broken);
}

#[test]
fn the_measure_of_python_functions_measures() {
    let text = "class X:\n    async def one(\n        self,\n    ) -> int:\n        if True:\n\n            return 1\n\n\n\
                    def two() -> int: ...\n\n\ndef three[T](x: T) -> T:\n    return x\n";
    assert_eq!(
        python_functions(text),
        [("one".to_owned(), 6), ("two".to_owned(), 1), ("three".to_owned(), 2)]
    );
}

#[test]
fn the_measure_of_functions_measures() {
    let text = "pub(crate) fn one() {\n    a\n}\n\nimpl X {\n    async fn two(\n        x: u8,\n    ) -> u8 {\n        \
                if x {\n        }\n    }\n    fn three() {}\n}\ntrait T {\n    fn four(\n        &self,\n    ) -> u8;\n}\n";
    assert_eq!(functions(text), [("one".to_owned(), 3), ("two".to_owned(), 6)]);
}
