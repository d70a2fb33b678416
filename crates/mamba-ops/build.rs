//! Compiles `kernels/*.cu` to fat binaries, one an op, which the crate embeds: machine code for some GPUs, PTX for later
//! ones. Without the feature `cuda` there is nothing to do.
//!
//! `CUDA_COMPUTE_CAP` narrows the GPUs, as in `90` or `80,90`; `NVCC` or `CUDA_HOME` says where the compiler is.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::Mutex;
use std::thread;

/// What is built for if nothing is said: A100 and H100, and by PTX whatever is newer than either.
const DEFAULT_CAPABILITIES: &str = "80,90";

/// The oldest compiler that knows every GPU above.
const OLDEST_NVCC: (u32, u32) = (12, 0);

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(message) = build() {
        println!("cargo::error={message}");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let kernels = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("kernels");
    let out = PathBuf::from(variable("OUT_DIR")?);
    println!("cargo::rerun-if-changed={}", kernels.display());
    let mut sources = vec![];
    for entry in kernels.read_dir().map_err(|e| format!("{}: {e}", kernels.display()))? {
        let path = entry.map_err(|e| format!("{}: {e}", kernels.display()))?.path();
        // Each by name: a folder behind a symbolic link changes without notice.
        println!("cargo::rerun-if-changed={}", path.display());
        if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(path);
        }
    }
    sources.sort();

    let capabilities = capabilities()?;
    let nvcc = nvcc()?;
    knows(&nvcc, &capabilities)?;
    println!("cargo::rustc-env=MAMBA_CUDA_CAPABILITIES={}", capabilities.join(", "));

    let workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize).clamp(1, 16);
    let (queue, failures) = (Mutex::new(sources.iter()), Mutex::new(vec![]));
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(source) = queue.lock().ok().and_then(|mut queue| queue.next()) {
                    if let Err(message) = compile(&nvcc, &capabilities, source, &out) {
                        failures.lock().into_iter().for_each(|mut all| all.push(message.clone()));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().map_err(|e| e.to_string())?;
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("{name} is not set: this script is for cargo to run"))
}

/// `CUDA_COMPUTE_CAP`, or the default, as numbers without a point.
fn capabilities() -> Result<Vec<String>, String> {
    let list = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| DEFAULT_CAPABILITIES.into());
    let one = |word: &str| -> Result<String, String> {
        let digits = word.trim().replace('.', "");
        match digits.parse::<u32>() {
            Ok(80..) => Ok(digits),
            _ => Err(format!("CUDA_COMPUTE_CAP has `{word}`, expected 80 or more, as in 80,90")),
        }
    };
    list.split([',', ';']).map(one).collect()
}

/// Where the compiler is, if it is there and new enough.
fn nvcc() -> Result<PathBuf, String> {
    let toolkits = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR"];
    let candidates = env::var_os("NVCC")
        .map(PathBuf::from)
        .into_iter()
        .chain(toolkits.iter().filter_map(env::var_os).map(|root| Path::new(&root).join("bin/nvcc")))
        .chain([PathBuf::from("nvcc"), PathBuf::from("/usr/local/cuda/bin/nvcc")]);
    for nvcc in candidates {
        let Ok(output) = Command::new(&nvcc).arg("--version").output() else { continue };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = release(&text).ok_or_else(|| format!("{} gives no version: {text}", nvcc.display()))?;
        if version < OLDEST_NVCC {
            return Err(format!(
                "{} is of CUDA {}.{}, but the feature `cuda` of mamba-ops needs {}.{} or later: install a newer CUDA \
                 toolkit (https://developer.nvidia.com/cuda-downloads) or point CUDA_HOME at one",
                nvcc.display(),
                version.0,
                version.1,
                OLDEST_NVCC.0,
                OLDEST_NVCC.1
            ));
        }
        return Ok(nvcc);
    }
    Err("no nvcc found, which the feature `cuda` of mamba-ops needs: install the CUDA toolkit \
         (https://developer.nvidia.com/cuda-downloads), put its `bin` on PATH or set CUDA_HOME, or build without the \
         feature `cuda`"
        .into())
}

/// Whether the compiler knows the GPUs that it is to build for; one that lists none is believed to.
fn knows(nvcc: &Path, capabilities: &[String]) -> Result<(), String> {
    let output = Command::new(nvcc).arg("--list-gpu-arch").output();
    let list = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let known: Vec<&str> = list.lines().filter_map(|line| line.trim().strip_prefix("compute_")).collect();
    match capabilities.iter().find(|capability| !known.contains(&capability.as_str())) {
        Some(unknown) if !known.is_empty() => Err(format!(
            "CUDA_COMPUTE_CAP has `{unknown}`, but {} builds for {}: install another CUDA toolkit \
             (https://developer.nvidia.com/cuda-downloads), or set CUDA_COMPUTE_CAP to the largest of these that is not \
             above {unknown}, which runs there too",
            nvcc.display(),
            known.join(", ")
        )),
        _ => Ok(()),
    }
}

/// The version in `Cuda compilation tools, release 13.0, V13.0.88`.
fn release(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("release ")?;
    let (major, rest) = rest.split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn compile(nvcc: &Path, capabilities: &[String], source: &Path, out: &Path) -> Result<(), String> {
    let name = source.file_stem().unwrap_or_default();
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "--expt-relaxed-constexpr"]);
    for capability in capabilities {
        command
            .arg(format!("-gencode=arch=compute_{capability},code=[sm_{capability},compute_{capability}]"));
    }
    command.arg("-o").arg(out.join(name).with_extension("fatbin")).arg(source);
    let output = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    Err(format!("nvcc could not compile {}: {}", source.display(), text.trim().replace('\n', " | ")))
}
