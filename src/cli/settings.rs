//! From options to settings: which option means something to which command, what has to be there, what
//! contradicts what. The only place that knows.

use std::{
    env,
    ffi::OsString,
    fmt::Write as _,
    fs, io, iter,
    path::{self, Path, PathBuf},
    time::Duration,
};

use clap::Parser;

use super::{
    argv::{self, ArgvError, Given, Line, Origin},
    config::{self, ConfigError},
    known::{self, COMMANDS_TO_COME, Command, Standing},
    opts::Opts,
    remotely,
};
use crate::{
    action::ActionScripts,
    deadline,
    settings::{
        CacheRequest, CacheSettings, CheckSettings, CommonSettings, DEFAULT_STANDSTILL, DEFAULT_TIMEOUT,
        DumpSettings, Leave, LogSettings, MigrateRequest, MigrateSettings, ProxySettings, RemoteSettings,
        ReportSettings, RestoreSettings,
    },
};

/// What CRIU can do with control groups.
const CGROUP_MODES: [&str; 5] = ["none", "props", "soft", "full", "strict"];
const NO_SOCKETS: &str = "sockets are not saved yet, and a tree that has some is refused";
const NO_NAMESPACES: &str = "namespaces are not saved yet, and a tree in others than crtool's is refused";

/// A mistake of the caller: said in one line, nothing done.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub(crate) enum UsageError {
    #[error(transparent)]
    Argv(#[from] ArgvError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("options of the restores that image-cache starts")]
    OfRestores(#[source] Box<UsageError>),
    #[error("no command given; see crtool --help")]
    NoCommand,
    #[error("unknown command {word}{}; see crtool --help", did_you_mean(near.as_deref()))]
    UnknownCommand { word: String, near: Option<String> },
    #[error("command {0} is not supported yet")]
    CommandToCome(String),
    #[error("{origin}option --{name} is not supported yet: without it {otherwise}")]
    ToCome { origin: Origin, name: &'static str, otherwise: &'static str },
    #[error("{origin}option --{name}={value} is not supported yet")]
    ValueToCome { origin: Origin, name: &'static str, value: String },
    #[error("{origin}option --{name} is deprecated; {instead}")]
    Gone { origin: Origin, name: &'static str, instead: &'static str },
    #[error("{origin}option --{name} cannot be used with {command}")]
    NotFor { origin: Origin, name: &'static str, command: &'static str },
    #[error("{origin}option --{name}: {value:?}: {wanted}")]
    Value { origin: Origin, name: String, value: String, wanted: String },
    #[error("command {0} needs {1}")]
    Needs(&'static str, &'static str),
    #[error("unexpected word {word:?}{}", did_you_mean(near.as_deref()))]
    Surplus { word: OsString, near: Option<String> },
    #[error("option --{0} only makes sense with {1}")]
    OnlyWith(&'static str, &'static str),
    #[error("option --{0} cannot be used together with --{1}")]
    NotWith(&'static str, &'static str),
    #[error("{what} {}", path.display())]
    Dir { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{0}")]
    Other(String),
}

fn did_you_mean(what: Option<&str>) -> String {
    what.map_or_else(String::new, |what| format!("; did you mean {what}?"))
}

/// What to do.
#[derive(Debug)]
pub(crate) enum Task {
    /// `crtool dump`.
    Dump(Box<DumpSettings>, ReportSettings),
    /// `crtool restore`.
    Restore(Box<RestoreSettings>, ReportSettings),
    /// `crtool check`.
    Check(CheckSettings),
    /// `crtool image`, with all its words.
    Image(Vec<OsString>),
    /// `crtool demo`.
    Demo,
    /// `crtool image-cache`.
    Cache(Box<CacheSettings>),
    /// `crtool image-cache list` and the like, about the cache of a work dir.
    AskCache(CacheRequest, PathBuf),
    /// `crtool image-proxy`.
    Proxy(Box<ProxySettings>),
    /// `crtool image-proxy status`, about the proxy of a work dir.
    ProxyStatus(PathBuf),
    /// `crtool migrate`.
    Migrate(Box<MigrateSettings>, ReportSettings),
    /// `crtool migrate settle` and the like; how the destination is asked.
    AskMigrate(MigrateRequest, Box<RemoteSettings>),
    /// `--help`, of all or of one command that has its own.
    Help(Option<Command>),
    /// `--version`.
    Version,
}

/// What to do, and what to do first.
#[derive(Debug)]
pub(crate) struct Plan {
    /// What to do.
    pub(crate) task: Task,
    /// Where messages go.
    pub(crate) log: LogSettings,
    /// How long its file may take to be opened.
    pub(crate) limit: Option<Duration>,
    /// Descriptors to close.
    pub(crate) close: Vec<i32>,
    /// Things the caller should hear that stop nothing.
    pub(crate) warnings: Vec<String>,
}

/// Reads the words after the program's name, and the configuration files.
pub(crate) fn plan(words: Vec<OsString>) -> Result<Plan, UsageError> {
    let line = argv::walk(words)?;
    let asks = |word: &OsString| word == "help";
    if line.options.iter().any(|given| given.known.long == "help") || line.words.first().is_some_and(asks) {
        let word = line.words.iter().find(|word| !asks(word));
        let command =
            Command::ALL.into_iter().find(|command| word.is_some_and(|word| word == command.name()));
        let of = command.filter(|command| command.has_help());
        return Ok(Plan::only(Task::Help(of)));
    }
    if line.options.iter().any(|given| given.known.long == "version") {
        return Ok(Plan::only(Task::Version));
    }
    let command = command_of(&line)?;
    let mut warnings = Vec::new();
    let mut options = Vec::new();
    if command != Command::Image {
        options = configured(&line.options, &mut warnings)?;
    }
    options.extend(line.options);
    let options = legal(argv::settle(options), command, &mut warnings)?;
    let opts = Opts::try_parse_from(
        iter::once(OsString::from("crtool")).chain(argv::canonical(&options, &line.words)),
    )
    .map_err(|error| explain(&error, &options))?;
    build(opts, &options, warnings)
}

fn command_of(line: &Line) -> Result<Command, UsageError> {
    let Some(word) = line.words.first() else {
        return Err(UsageError::NoCommand);
    };
    let word = word.to_string_lossy();
    match Command::ALL.into_iter().find(|command| command.name() == word) {
        Some(command) => Ok(command),
        None if COMMANDS_TO_COME.contains(&&*word) => Err(UsageError::CommandToCome(word.into_owned())),
        None => {
            let commands =
                Command::ALL.into_iter().map(Command::name).chain(COMMANDS_TO_COME.iter().copied());
            Err(UsageError::UnknownCommand { near: known::nearest(&word, commands), word: word.into_owned() })
        }
    }
}

/// Options from configuration files, in the order in which they count.
fn configured(words: &[Given], warnings: &mut Vec<String>) -> Result<Vec<Given>, UsageError> {
    let mut options = Vec::new();
    if !words.iter().any(|given| given.known.long == "no-default-config") {
        options.extend(config::defaults(warnings)?);
    }
    for path in config::named(words) {
        match config::file(Path::new(path)) {
            Ok(more) => options.extend(more),
            // CRIU goes on without it, so scripts may rely on that.
            Err(ConfigError::Read { path, source }) if source.kind() == io::ErrorKind::NotFound => {
                warnings.push(format!("configuration file {} does not exist", path.display()));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(options)
}

/// Refuses what cannot be done, and drops what has no effect on this command.
fn legal(
    options: Vec<Given>,
    command: Command,
    warnings: &mut Vec<String>,
) -> Result<Vec<Given>, UsageError> {
    let mut kept = Vec::with_capacity(options.len());
    for given in options {
        let name = given.known.long;
        let standing = match given.known.standing {
            Standing::Works(other) => {
                known::all().find(|known| known.long == other).map(|known| known.standing)
            }
            own => Some(own),
        };
        let typed = given.origin == Origin::Words;
        // What a configuration file says about dump and restore does not stop the others.
        let concerned = typed || matches!(command, Command::Dump | Command::Restore);
        let no_effect = match standing {
            Some(Standing::ToCome(commands, otherwise)) if commands.contains(&command) => {
                return Err(UsageError::ToCome { origin: given.origin, name, otherwise });
            }
            Some(Standing::Gone(instead)) if concerned => {
                return Err(UsageError::Gone { origin: given.origin, name, instead });
            }
            Some(Standing::Only(commands)) if typed && !commands.contains(&command) => {
                let command = command.name();
                return Err(UsageError::NotFor { origin: given.origin, name, command });
            }
            Some(Standing::Only(commands) | Standing::For(commands)) if commands.contains(&command) => {
                kept.push(given);
                continue;
            }
            Some(Standing::Moot(why)) => format!("option --{name} has no effect: {why}"),
            _ => format!("option --{name} has no effect on {}", command.name()),
        };
        if typed {
            warnings.push(no_effect);
        }
    }
    Ok(kept)
}

/// One line for what the typed parser did not like.
fn explain(error: &clap::Error, options: &[Given]) -> UsageError {
    use clap::error::{ContextKind, ContextValue};
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let (Some(arg), Some(value)) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue)) else {
        let all = error.to_string();
        let first = all.lines().next().unwrap_or_default();
        return UsageError::Other(first.trim_start_matches("error: ").to_owned());
    };
    let name = arg
        .trim_start_matches('-')
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
        .next()
        .unwrap_or_default()
        .to_owned();
    let origin = options
        .iter()
        .rfind(|given| {
            given.known.canonical() == name
                && given.value.as_ref().is_some_and(|given| given.to_string_lossy() == value)
        })
        .map_or(Origin::Words, |given| given.origin.clone());
    let mut wanted = String::new();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        if !wanted.is_empty() {
            wanted.push_str(": ");
        }
        let _ = write!(wanted, "{next}");
        cause = next.source();
    }
    if wanted.is_empty() {
        wanted.push_str(if value.is_empty() { "it is empty" } else { "not a value this option takes" });
    }
    UsageError::Value { origin, name, value, wanted }
}

fn build(mut opts: Opts, options: &[Given], mut warnings: Vec<String>) -> Result<Plan, UsageError> {
    let command = opts.command;
    let place = |name| {
        options
            .iter()
            .rfind(|given| given.known.canonical() == name)
            .map_or(Origin::Words, |given| given.origin.clone())
    };
    if let Some(word) = opts.words.first()
        && command != Command::Image
        && !command.has_help()
        && !opts.exec_cmd
    {
        let is_pid = word.to_str().is_some_and(|word| word.parse::<u32>().is_ok());
        let near = (is_pid && opts.tree.is_none()).then(|| format!("--tree {}", word.display()));
        return Err(UsageError::Surplus { word: word.clone(), near });
    }
    if let Some(mode) = &opts.manage_cgroups
        && mode != "ignore"
    {
        let (name, value) = ("manage-cgroups", mode.clone());
        if !CGROUP_MODES.contains(&mode.as_str()) {
            let wanted = format!("the mode is one of {}, ignore", CGROUP_MODES.join(", "));
            return Err(UsageError::Value { origin: place(name), name: name.to_owned(), value, wanted });
        }
        return Err(UsageError::ValueToCome { origin: place(name), name, value });
    }
    if let Some(kind) = foreign_externals(&mut opts, &mut warnings) {
        let (name, value) = ("external".to_owned(), kind);
        let wanted =
            "no kind of resource: file, tty and pipe, and those of sockets and namespaces".to_owned();
        return Err(UsageError::Value { origin: place("external"), name, value, wanted });
    }
    let typed = Typed(options);
    let here = Path::new(".");
    let limited = matches!(command, Command::Dump | Command::Restore | Command::Check | Command::Migrate);
    let limit = time_limit(&opts, Some(DEFAULT_TIMEOUT)).filter(|_| limited);
    let (images_dir, work_dir) = if opts.remote || command.has_help() {
        let work_dir = directory("work directory", opts.work_dir.as_deref(), here, limit)?;
        (work_dir.clone(), work_dir)
    } else if !matches!(command, Command::Dump | Command::Restore) && opts.work_dir.is_none() {
        // Where nothing has to be, the current directory may be one that is gone.
        let dir = directory("work directory", None, here, limit).unwrap_or_else(|_| here.to_owned());
        (dir.clone(), dir)
    } else {
        let images_dir = directory("images directory", opts.images_dir.as_deref(), here, limit)?;
        let work_dir = directory("work directory", opts.work_dir.as_deref(), &images_dir, limit)?;
        (images_dir, work_dir)
    };
    let mut level = opts.verbosity;
    // What a daemon does is worth a line each time, and there is no other way to see it later.
    if command.is_daemon()
        // With --restore they are options of the restores.
        && (opts.words.is_empty() || opts.restore)
        && !options.iter().any(|given| given.known.long == "verbosity")
    {
        level = level.max(3);
    }
    let log = LogSettings {
        file: opts.log_file.clone(),
        work_dir: work_dir.clone(),
        level,
        per_pid: opts.log_pid,
        owner_check: opts.owner_check(),
    };
    let close = opts.close.clone();
    let report = ReportSettings { display_stats: opts.display_stats, status_fd: opts.status_fd };
    let task = match command {
        Command::Image => Task::Image(opts.words),
        Command::Demo => Task::Demo,
        Command::Check => Task::Check(check(opts, &images_dir, work_dir)),
        Command::Dump => Task::Dump(Box::new(dump(opts, typed, &images_dir, work_dir)?), report),
        Command::Restore => Task::Restore(Box::new(restore(opts, typed, &images_dir, work_dir)?), report),
        Command::ImageCache => remotely::cache(opts, typed, work_dir)?,
        Command::ImageProxy => remotely::proxy(opts, typed, work_dir)?,
        Command::Migrate => migrate(opts, typed, work_dir, report)?,
    };
    Ok(Plan { task, log, limit, close, warnings })
}

/// Takes out resources of sockets and namespaces: a tree that has any is refused, so naming one changes nothing. What
/// is of no kind at all is returned.
fn foreign_externals(opts: &mut Opts, warnings: &mut Vec<String>) -> Option<String> {
    let mut unknown = None;
    opts.external.retain(|external| {
        let kind = external.key.split(|&byte| byte == b'[').next().unwrap_or_default();
        match kind {
            b"file" | b"tty" | b"pipe" => return true,
            b"unix" => warnings.push(format!("option --external {external} has no effect: {NO_SOCKETS}")),
            b"mnt" | b"dev" | b"net" | b"pid" | b"veth" | b"macvlan" | b"netdev" => {
                warnings.push(format!("option --external {external} has no effect: {NO_NAMESPACES}"));
            }
            _ => unknown = Some(external.to_string()),
        }
        false
    });
    unknown
}

/// The options as they were given, to tell what was typed from what a configuration file says for all commands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Typed<'a>(&'a [Given]);

impl Typed<'_> {
    /// The first of `names` that was typed.
    pub(super) fn first(self, names: &[&'static str]) -> Option<&'static str> {
        let typed = |name: &&&str| {
            self.0.iter().any(|given| given.known.long == **name && given.origin == Origin::Words)
        };
        names.iter().find(typed).copied()
    }

    /// None of `names` was typed, for it only makes sense with `with`.
    pub(super) fn needless(self, names: &[&'static str], with: &'static str) -> Result<(), UsageError> {
        self.first(names).map_or(Ok(()), |name| Err(UsageError::OnlyWith(name, with)))
    }
}

impl Plan {
    fn only(task: Task) -> Self {
        Self { task, log: LogSettings::default(), limit: None, close: Vec::new(), warnings: Vec::new() }
    }
}

/// An absolute path, so that nothing depends on the current directory from here on.
fn directory(
    what: &'static str,
    given: Option<&Path>,
    default: &Path,
    limit: Option<Duration>,
) -> Result<PathBuf, UsageError> {
    let path = given.unwrap_or(default);
    let failed = |source| UsageError::Dir { what, path: path.to_owned(), source };
    let absolute = if path == Path::new(".") {
        env::current_dir().map_err(failed)?
    } else {
        path::absolute(path).map_err(failed)?
    };
    let asked = absolute.clone();
    let meta = deadline::within(limit, move || fs::metadata(asked))
        .map_err(|late| failed(io::Error::new(io::ErrorKind::TimedOut, late)))?
        .map_err(failed)?;
    if !meta.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    Ok(absolute)
}

fn common(opts: &Opts, images_dir: &Path, work_dir: PathBuf) -> CommonSettings {
    CommonSettings {
        images_dir: images_dir.to_owned(),
        shell_job: opts.shell_job,
        file_locks: opts.file_locks,
        link_remap: opts.link_remap,
        evasive_devices: opts.evasive_devices,
        file_validation: opts.file_validation.unwrap_or_default(),
        cpu_cap: opts.cpu_cap,
        owner_check: opts.owner_check(),
        externals: opts.external.clone(),
        action_scripts: ActionScripts {
            scripts: opts.action_script.clone(),
            images_dir: images_dir.to_owned(),
            work_dir: work_dir.clone(),
        },
        work_dir,
    }
}

fn dump(
    opts: Opts,
    typed: Typed<'_>,
    images_dir: &Path,
    work_dir: PathBuf,
) -> Result<DumpSettings, UsageError> {
    let Some(pid) = opts.tree else {
        return Err(UsageError::Needs("dump", "--tree PID"));
    };
    let mut settings = DumpSettings::new(pid, images_dir);
    settings.remote = remotely::dump(&opts, typed, &work_dir)?;
    settings.common = common(&opts, images_dir, work_dir);
    settings.leave = match (opts.leave_running, opts.leave_stopped) {
        (true, _) => Leave::Running,
        (_, true) => Leave::Stopped,
        _ => Leave::Killed,
    };
    settings.sync = !opts.no_sync;
    collecting(&opts, &mut settings);
    Ok(settings)
}

fn migrate(
    mut opts: Opts,
    typed: Typed<'_>,
    work_dir: PathBuf,
    report: ReportSettings,
) -> Result<Task, UsageError> {
    let request = remotely::migrate_request(&opts)?;
    let remote = remotely::migrate(&opts, typed, &work_dir)?;
    if let Some(request) = request {
        typed.needless(&["tree", "max-pause", "json"], "migrate -t")?;
        return Ok(Task::AskMigrate(request, Box::new(remote)));
    }
    let Some(pid) = opts.tree else {
        return Err(UsageError::Needs(
            "migrate",
            "--tree PID, or one of the words list, settle, thaw and kill",
        ));
    };
    opts.remote = true;
    let mut dump = DumpSettings::new(pid, &work_dir);
    dump.common = common(&opts, &work_dir, work_dir.clone());
    collecting(&opts, &mut dump);
    dump.remote = Some(remote);
    let max_pause = opts.max_pause.map(Duration::from_secs_f64);
    Ok(Task::Migrate(Box::new(MigrateSettings { dump, max_pause, json: opts.json }), report))
}

/// `--timeout`: 0 for no limit.
fn time_limit(opts: &Opts, default: Option<Duration>) -> Option<Duration> {
    match opts.timeout {
        None => default,
        // Of a restore from a cache it is how long the snapshot is waited for, first of all.
        Some(seconds) if opts.remote && opts.command == Command::Restore => {
            (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)).max(DEFAULT_TIMEOUT))
        }
        Some(seconds) => (seconds > 0).then(|| Duration::from_secs(u64::from(seconds))),
    }
}

/// What `dump` and `check -t` are told about how a tree is collected.
fn collecting(opts: &Opts, settings: &mut DumpSettings) {
    settings.timeout = time_limit(opts, settings.timeout);
    settings.standstill = if opts.remote {
        // The connection has limits of its own, and they come first.
        settings.timeout.map(|limit| DEFAULT_STANDSTILL + 3 * limit)
    } else {
        time_limit(opts, settings.standstill)
    };
    if let Some(bytes) = opts.ghost_limit {
        settings.ghost_limit = bytes;
    }
    settings.ghost_fiemap = !opts.no_ghost_fiemap;
    settings.force_irmap = opts.force_irmap;
    settings.irmap_scan_paths.clone_from(&opts.irmap_scan_path);
}

fn restore(
    opts: Opts,
    typed: Typed<'_>,
    images_dir: &Path,
    work_dir: PathBuf,
) -> Result<RestoreSettings, UsageError> {
    if opts.restore_sibling && !opts.restore_detached {
        return Err(UsageError::OnlyWith("restore-sibling", "--restore-detached"));
    }
    if opts.exec_cmd && opts.words.is_empty() {
        return Err(UsageError::Needs("restore --exec-cmd", "a program after --"));
    }
    let mut settings = RestoreSettings::new(images_dir);
    settings.remote = remotely::restore(&opts, typed, &work_dir)?;
    settings.common = common(&opts, images_dir, work_dir);
    settings.detached = opts.restore_detached;
    settings.sibling = opts.restore_sibling;
    settings.leave_stopped = opts.leave_stopped;
    settings.timeout = time_limit(&opts, settings.timeout);
    settings.skip_file_rwx_check = opts.skip_file_rwx_check;
    settings.allow_symlinks = opts.allow_symlinks;
    settings.host_clocks = opts.host_clocks;
    settings.inherit_fds = opts.inherit_fd;
    settings.pidfile = opts.pidfile;
    settings.exec_cmd = opts.exec_cmd.then_some(opts.words);
    Ok(settings)
}

fn check(opts: Opts, images_dir: &Path, work_dir: PathBuf) -> CheckSettings {
    if let Some(pid) = opts.tree {
        let mut settings = DumpSettings::new(pid, images_dir);
        settings.common = common(&opts, images_dir, work_dir);
        collecting(&opts, &mut settings);
        CheckSettings::Tree(Box::new(settings))
    } else if opts.feature.iter().any(|name| name == "list") {
        CheckSettings::List
    } else if opts.feature.is_empty() {
        CheckSettings::Kernel { extra: opts.extra || opts.all, experimental: opts.experimental || opts.all }
    } else {
        CheckSettings::Features(opts.feature)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::settings::{CpuCap, External, FileValidation, InheritFd, OwnerCheck};

    fn planned(text: &str) -> Plan {
        let words = text.split_whitespace().chain(["--no-default-config"]).map(OsString::from).collect();
        plan(words).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn dumped(text: &str) -> DumpSettings {
        match planned(&format!("dump -t 5 {text}")).task {
            Task::Dump(settings, _) => *settings,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn restored(text: &str) -> RestoreSettings {
        // `--` ends the options, so what is tested comes before the command.
        let words = format!("--no-default-config restore {text}");
        match plan(words.split_whitespace().map(OsString::from).collect()).map(|plan| plan.task) {
            Ok(Task::Restore(settings, _)) => *settings,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn defaults() {
        let here = env::current_dir().unwrap();
        let settings = dumped("");
        assert_eq!(settings.pid.as_raw(), 5);
        assert_eq!(settings.leave, Leave::Killed);
        assert_eq!(settings.timeout, Some(Duration::from_secs(10)));
        assert_eq!(settings.ghost_limit, 1 << 20);
        assert_eq!(settings.common.images_dir, here);
        assert_eq!(settings.common.work_dir, here);
        assert_eq!(settings.common.cpu_cap, None);
        assert_eq!(settings.common.file_validation, FileValidation::BuildId);
        let settings = restored("");
        assert!(!settings.detached && !settings.sibling && !settings.leave_stopped);
        assert_eq!(settings.exec_cmd, None);
    }

    #[test]
    fn each_option_reaches_its_setting() {
        for (text, leave) in [
            ("-R", Leave::Running),
            ("-s", Leave::Stopped),
            ("-R -s", Leave::Stopped),
            ("-s -R", Leave::Running),
            ("-s --leave-stopped", Leave::Stopped),
        ] {
            assert_eq!(dumped(text).leave, leave, "{text}");
        }
        assert_eq!(dumped("-t 6 --tree=7").pid.as_raw(), 7);
        let limits = |words: &str| [dumped(words).timeout, dumped(words).standstill];
        assert_eq!(limits(""), [DEFAULT_TIMEOUT, DEFAULT_STANDSTILL].map(Some));
        assert_eq!(limits("--timeout 3"), [Some(Duration::from_secs(3)); 2]);
        assert_eq!(limits("--timeout 0"), [None; 2]);
        assert_eq!(dumped("--ghost-limit 3M --ghost-limit 2K").ghost_limit, 2048);
        let common = dumped("-j -l --link-remap --evasive-devices").common;
        assert!(common.shell_job && common.file_locks && common.link_remap && common.evasive_devices);
        let common = dumped("-j --no-shell-job -l --no-file-locks --no-link-remap").common;
        assert!(!common.shell_job && !common.file_locks && !common.link_remap);
        assert_eq!(dumped("--file-validation=filesize").common.file_validation, FileValidation::FileSize);
        assert_eq!(dumped("--cpu-cap").common.cpu_cap, Some(CpuCap::ALL));
        assert_eq!(dumped("--cpu-cap=none").common.cpu_cap, Some(CpuCap::NONE));
        let settings = dumped("");
        assert!(settings.ghost_fiemap && !settings.force_irmap && settings.irmap_scan_paths.is_empty());
        assert!(settings.sync && settings.common.owner_check == OwnerCheck::On);
        let settings = dumped("--no-sync --no-owner-check");
        assert!(!settings.sync && settings.common.owner_check == OwnerCheck::Off);
        assert_eq!(restored("--no-owner-check").common.owner_check, OwnerCheck::Off);
        let settings = dumped("--no-ghost-fiemap --force-irmap --irmap-scan-path /a --irmap-scan-path=b");
        assert!(!settings.ghost_fiemap && settings.force_irmap);
        assert_eq!(settings.irmap_scan_paths, [Path::new("/a"), Path::new("b")]);
        assert!(dumped("--no-ghost-fiemap --ghost-fiemap").ghost_fiemap);
        let external = |key: &[u8], value: Option<&[u8]>| External {
            key: key.to_vec(),
            value: value.map(<[u8]>::to_vec),
        };
        assert_eq!(
            dumped("--external file[1:2] --external tty[3:4]:x").common.externals,
            [external(b"file[1:2]", None), external(b"tty[3:4]", Some(b"x"))]
        );
        let scripts = dumped("-D / -W /tmp --action-script a --action-script b").common.action_scripts;
        assert_eq!(scripts.scripts, [Path::new("a"), Path::new("b")]);
        assert_eq!(scripts.images_dir, Path::new("/"));
        assert_eq!(scripts.work_dir, Path::new("/tmp"));
        let common = dumped("-D /tmp").common;
        assert_eq!((common.images_dir, common.work_dir), ("/tmp".into(), "/tmp".into()));

        let settings = restored("-d -S -s --pidfile p --skip-file-rwx-check --inherit-fd fd[3]:pipe[9]");
        assert!(settings.detached && settings.sibling && settings.leave_stopped);
        assert!(settings.skip_file_rwx_check);
        assert_eq!(settings.pidfile.as_deref(), Some(Path::new("p")));
        assert_eq!(settings.inherit_fds, [InheritFd { key: b"pipe[9]".to_vec(), fd: 3 }]);
        let program = restored("--exec-cmd -- prog -x --tree").exec_cmd.unwrap();
        assert_eq!(program, ["prog", "-x", "--tree"]);
    }

    #[test]
    fn log_report_and_check() {
        let plan =
            planned("dump -t 5 -v4 -o x -W /tmp --log-pid --close 7 --close 8 --status-fd 9 --display-stats");
        assert_eq!(plan.log.file.as_deref(), Some(Path::new("x")));
        assert_eq!(plan.log.work_dir, Path::new("/tmp"));
        assert_eq!((plan.log.level, plan.log.per_pid), (4, true));
        assert_eq!(plan.close, [7, 8]);
        let Task::Dump(_, report) = plan.task else { panic!("{:?}", plan.task) };
        assert_eq!(report, ReportSettings { display_stats: true, status_fd: Some(9) });

        let checked = |text: &str| match planned(&format!("check {text}")).task {
            Task::Check(settings) => settings,
            other => panic!("{text}: {other:?}"),
        };
        let kernel = |text: &str, wanted: (bool, bool)| match checked(text) {
            CheckSettings::Kernel { extra, experimental } => {
                assert_eq!((extra, experimental), wanted, "{text}")
            }
            other => panic!("{text}: {other:?}"),
        };
        kernel("", (false, false));
        kernel("--extra", (true, false));
        kernel("--experimental", (false, true));
        kernel("--all", (true, true));
        kernel("--extra --no-extra", (false, false));
        assert!(matches!(checked("--feature list"), CheckSettings::List));
        assert!(
            matches!(checked("--feature a --feature b"), CheckSettings::Features(names) if names == ["a", "b"])
        );
        let CheckSettings::Tree(settings) = checked("-t 5 -j --ghost-limit 7") else { panic!("no tree") };
        assert!(settings.common.shell_job);
        assert_eq!((settings.pid.as_raw(), settings.ghost_limit), (5, 7));
    }

    proptest! {
        /// Any words give settings or one error.
        #[test]
        fn any_words(words in prop::collection::vec(
            prop_oneof![
                Just("dump".to_owned()), Just("restore".to_owned()), Just("--".to_owned()),
                "-{0,2}[a-zA-Z-]{0,12}(=[a-z0-9,^\\[\\]:]{0,8})?",
                "--(no-)?(tree|cpu-cap|external|inherit-fd|ghost-limit|exec-cmd|verbosity|close)=?.{0,6}",
                ".{0,8}",
            ], 0..6))
        {
            let words = words.into_iter().chain(["--no-default-config".to_owned()]).map(OsString::from).collect();
            if let Err(error) = plan(words) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}
