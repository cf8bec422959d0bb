"""Whole models: conversion, calibration, variances in and out, summary, check."""
