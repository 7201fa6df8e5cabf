//! Stand-in.
// Minimal stand-in until branch `policy` lands: on a merge conflict take the whole file of branch `policy`.
#![allow(missing_docs, reason = "stand-in")]
use std::sync::Arc; use crate::policy::*; use crate::view::DType; use crate::error::*;
#[derive(Clone,Copy,Debug,PartialEq)] pub enum Budget { Tokens(usize), Fraction(f64), Bytes(usize) }
impl std::fmt::Display for Budget { fn fmt(&self,f:&mut std::fmt::Formatter<'_>)->std::fmt::Result{ write!(f,"{self:?}") } }
#[derive(Clone,Copy,Debug,PartialEq,Eq)] pub enum PositionMode { Keep, Renumber }
#[derive(Clone,Debug)] pub struct Recipe { pub policy: Arc<dyn Policy>, pub k: DType, pub v: DType, pub schedule: schedule::Schedule, pub positions: PositionMode }
impl Recipe { pub fn new(policy: Arc<dyn Policy>)->Self { Self{policy,k:DType::F32,v:DType::F32,schedule:schedule::Schedule{prefill:true,..schedule::Schedule::NEVER},positions:PositionMode::Keep} } }
impl std::fmt::Display for Recipe { fn fmt(&self,f:&mut std::fmt::Formatter<'_>)->std::fmt::Result{ write!(f,"{}",self.policy.name()) } }
#[derive(Debug)] struct Full; impl Policy for Full { fn name(&self)->&str{"full"} fn compresses(&self)->bool{false} fn equal_counts(&self)->bool{true}
 fn plan(&self, v:&LayerView<'_>)->Result<crate::plan::LayerPlan,PolicyError>{ Ok(crate::plan::LayerPlan{heads:v.heads.iter().map(|h|crate::plan::HeadPlan::identity(h.rows())).collect()})} }
impl std::str::FromStr for Recipe { type Err=RecipeError; fn from_str(_s:&str)->Result<Self,RecipeError>{ Ok(Self::new(Arc::new(Full))) } }
