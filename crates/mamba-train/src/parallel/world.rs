//! What a process is told about the others.

use crate::{Error, Result};

/// The place of a process among those of a training, as whoever started it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// Its number among those of its machine.
    pub local_rank: usize,
    /// The machine of rank 0, by name or address.
    pub master: String,
    /// Where rank 0 is to be found there.
    pub port: u16,
}

impl World {
    /// Reads the environment; none if it says nothing, or that there is one process.
    ///
    /// | | `torchrun`, Kubernetes | Slurm, where the former are missing |
    /// |---|---|---|
    /// | rank | `RANK` | `SLURM_PROCID` |
    /// | size | `WORLD_SIZE` | `SLURM_NTASKS` |
    /// | rank on the machine | `LOCAL_RANK`, else 0 | `SLURM_LOCALID` |
    /// | machine of rank 0 | `MASTER_ADDR` | the first of `SLURM_STEP_NODELIST` |
    /// | port | `MASTER_PORT`, else 29500 | 15000 and the last four digits of `SLURM_JOB_ID` |
    ///
    /// Where `torchrun` itself listens at `MASTER_PORT` (`TORCHELASTIC_USE_AGENT_STORE` is `True`), the port is the next one.
    ///
    /// # Errors
    /// If something is missing or cannot be.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_lookup(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// The same, from variables that `value` knows.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    ///
    /// # Example
    /// ```
    /// use mamba_train::parallel::World;
    /// let slurm = |name: &str| {
    ///     let value = match name {
    ///         "SLURM_PROCID" => "5",
    ///         "SLURM_NTASKS" => "8",
    ///         "SLURM_LOCALID" => "1",
    ///         "SLURM_STEP_NODELIST" => "gpu[007-008]",
    ///         "SLURM_JOB_ID" => "1234567",
    ///         _ => return None,
    ///     };
    ///     Some(value.to_owned())
    /// };
    /// let world = World::from_lookup(slurm)?.expect("several processes");
    /// assert_eq!((world.rank, world.size, world.local_rank), (5, 8, 1));
    /// assert_eq!((world.master.as_str(), world.port), ("gpu007", 19567));
    /// assert_eq!(World::from_lookup(|_| None)?, None);
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_lookup(value: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = value(name) else { return Ok(None) };
            let number = text.trim().parse();
            number.map(Some).map_err(|_| error(format!("{name} is `{text}`, expected a number")))
        };
        let first = |names: [&str; 2]| -> Result<Option<usize>> {
            Ok(match number(names[0])? {
                Some(number) => Some(number),
                None => number(names[1])?,
            })
        };
        let size = match number("WORLD_SIZE")? {
            Some(size) => Some(size),
            // Slurm says how many tasks an allocation has where none of them was started, too.
            None if value("SLURM_PROCID").is_some() => number("SLURM_NTASKS")?,
            None => None,
        };
        let Some(size) = size.filter(|size| *size != 1) else { return Ok(None) };
        let rank = first(["RANK", "SLURM_PROCID"])?
            .ok_or_else(|| error(format!("there are {size} processes, but RANK is not set")))?;
        if rank >= size {
            return Err(error(format!("the rank is {rank}, expected one below the number of ranks, {size}")));
        }
        let master = value("MASTER_ADDR").or_else(|| first_host(&value("SLURM_STEP_NODELIST")?));
        let master = master.ok_or_else(|| {
            error(format!("there are {size} processes, but MASTER_ADDR does not say where rank 0 is"))
        })?;
        let agent = usize::from(value("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|used| used == "True"));
        let port = match (number("MASTER_PORT")?, value("SLURM_JOB_ID")) {
            (Some(port), _) => port + agent,
            (None, Some(job)) => 15000 + job.trim().parse::<usize>().unwrap_or(0) % 10_000,
            (None, None) => 29500,
        };
        let port = u16::try_from(port).map_err(|_| error(format!("{port} is not a port")))?;
        let local_rank = first(["LOCAL_RANK", "SLURM_LOCALID"])?.unwrap_or(0);
        Ok(Some(Self { rank, size, local_rank, master, port }))
    }

    /// The GPU of this process: the one of its number on the machine, or, where it sees fewer, the one that it sees.
    ///
    /// # Errors
    /// If the program was built without the feature `cuda`, or there is no GPU.
    pub fn gpu(&self) -> Result<usize> {
        match gpus()? {
            0 => Err(error("no GPU is to be seen".into())),
            gpus => Ok(self.local_rank % gpus),
        }
    }
}

#[cfg(feature = "cuda")]
fn gpus() -> Result<usize> {
    let count = candle_core::cuda_backend::cudarc::driver::CudaContext::device_count();
    let count = count.map_err(|e| error(format!("no GPU can be used: {e}")))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> Result<usize> {
    Err(error("a GPU needs a program that was built with the feature `cuda`".into()))
}

/// The first of hosts as Slurm lists them: `a1,b2`, `gpu[007-009,012],other`.
fn first_host(list: &str) -> Option<String> {
    let (head, rest) = match list.find(['[', ',']) {
        Some(end) => list.split_at(end),
        None => (list, ""),
    };
    let number =
        rest.strip_prefix('[').map_or("", |numbers| numbers.split([',', '-', ']']).next().unwrap_or(""));
    let host = format!("{head}{number}");
    (!host.is_empty()).then_some(host)
}

fn error(message: String) -> Error {
    Error::Parallel(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(variables: &[(&str, &str)]) -> Result<Option<World>> {
        World::from_lookup(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn environments_are_understood() -> Result<()> {
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "a"),
            ("MASTER_PORT", "7000"),
        ];
        let expected = World { rank: 3, size: 4, local_rank: 1, master: "a".into(), port: 7000 };
        assert_eq!(world(&torchrun)?, Some(expected.clone()));
        // What torchrun says counts before what Slurm says, below which it may run.
        let both: Vec<_> = torchrun
            .into_iter()
            .chain([("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_LOCALID", "0")])
            .collect();
        assert_eq!(world(&both)?, Some(expected.clone()));
        let agent: Vec<_> = torchrun.into_iter().chain([("TORCHELASTIC_USE_AGENT_STORE", "True")]).collect();
        assert_eq!(world(&agent)?, Some(World { port: 7001, ..expected.clone() }));
        let kubernetes = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "job-0")];
        let expected = World { rank: 0, size: 2, local_rank: 0, master: "job-0".into(), port: 29500 };
        assert_eq!(world(&kubernetes)?, Some(expected));
        for one in [&[][..], &[("WORLD_SIZE", "1")], &[("SLURM_NTASKS", "8")], &[("RANK", "0")]] {
            assert_eq!(world(one)?, None, "{one:?}");
        }
        for (variables, message) in [
            (&[("WORLD_SIZE", "2")][..], "there are 2 processes, but RANK is not set"),
            (&[("WORLD_SIZE", "two")], "WORLD_SIZE is `two`, expected a number"),
            (
                &[("WORLD_SIZE", "2"), ("RANK", "2")],
                "the rank is 2, expected one below the number of ranks, 2",
            ),
            (
                &[("WORLD_SIZE", "2"), ("RANK", "1")],
                "there are 2 processes, but MASTER_ADDR does not say where rank 0 is",
            ),
            (
                &[("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "70000")],
                "70000 is not a port",
            ),
        ] {
            let error = world(variables).err().map(|e| e.to_string());
            assert_eq!(error, Some(format!("parallel training: {message}")));
        }
        Ok(())
    }

    #[test]
    fn slurm_lists_hosts() {
        for (list, host) in [
            ("node1", "node1"),
            ("node1,node2", "node1"),
            ("gpu[007-009,012],other", "gpu007"),
            ("gpu[3,5]", "gpu3"),
            ("rack-2-[11-12]", "rack-2-11"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(host));
        }
        assert_eq!(first_host(""), None);
    }
}
