{{- define "forwarder.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "forwarder.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := include "forwarder.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{/* The name of what belongs to the cluster: releases of one name may stand in several namespaces. */}}
{{- define "forwarder.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "forwarder.fullname" .) }}
{{- end }}

{{- define "forwarder.serviceAccountName" -}}
{{- default (ternary (include "forwarder.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{- define "forwarder.selectorLabels" -}}
app.kubernetes.io/name: {{ include "forwarder.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "forwarder.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
{{ include "forwarder.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* The selector of this installation's Pods, as the agent takes it. */}}
{{- define "forwarder.podSelector" -}}
app.kubernetes.io/name={{ include "forwarder.name" . }},app.kubernetes.io/instance={{ .Release.Name }}
{{- end }}

{{- define "forwarder.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{/* An address with a port, IPv6 in brackets. */}}
{{- define "forwarder.adminAddress" -}}
{{- $address := .Values.admin.address }}
{{- printf "%s:%d" (ternary (printf "[%s]" $address) $address (contains ":" $address)) (int .Values.admin.port) }}
{{- end }}

{{/* Where the kubelet finds the admin endpoint, from the node itself. */}}
{{- define "forwarder.probeHost" -}}
{{- $address := .Values.admin.address }}
{{- if eq $address "0.0.0.0" }}127.0.0.1{{ else if eq $address "::" }}::1{{ else }}{{ $address }}{{ end }}
{{- end }}

{{/* Where the container has the pin directory of the node. AppArmor's profile of container runtimes forbids to write, lock or link
     anything below /sys/fs/bpf, so it is another place. */}}
{{- define "forwarder.pinDirectory" -}}
/bpf/{{ .Values.bpf.pinDirectory }}
{{- end }}

{{/* What the agent reads and writes in each namespace that it serves. */}}
{{- define "forwarder.namespacedRules" -}}
- apiGroups: [gateway.networking.k8s.io]
  resources: [gateways, listenersets, tcproutes, referencegrants]
  verbs: [get, list, watch]
- apiGroups: [gateway.networking.k8s.io]
  resources: [gateways/status, listenersets/status, tcproutes/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [get, list, watch]
- apiGroups: ["", events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end }}
